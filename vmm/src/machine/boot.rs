//! Puts into memory what the kernel finds there when it starts.

use std::fs::File;

use bulkhead_vmm_api::WINDOWS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::arch::x86_64::{boot_params, elf, layout, mptable, regs};
use crate::sys;

/// Parameters that belong to this machine: where the console is, how to reset (the keyboard
/// controller), that a panic resets at once, and that code for one processor stays good for
/// several: rewriting each lock prefix costs a start one instruction in 25, and all of it again when
/// a second processor comes.
const BASICS: &str = "console=ttyS0 reboot=k panic=-1 noreplace-smp";
/// The kernel reads its initramfs by pages.
const PAGE: u64 = 4096;

/// Why the kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel's file is of no use.
    #[error("the kernel cannot be booted: {0}")]
    Kernel(#[from] elf::ElfError),
    /// A file could not be read.
    #[error("the {0} could not be read: {1}")]
    Read(&'static str, std::io::Error),
    /// It does not fit.
    #[error("the {what} does not fit into {mib} MiB of guest memory")]
    Memory {
        /// Kernel or initramfs.
        what: &'static str,
        /// The guest's memory.
        mib: u64,
    },
    /// Too many parameters.
    #[error("the kernel's command line has {0} bytes with the machine's own part; at most {max} are allowed", max = layout::COMMAND_LINE_BYTES - 1)]
    CommandLine(usize),
}

/// What to boot.
pub struct Boot<'f> {
    /// The kernel.
    pub kernel: &'f File,
    /// The initramfs.
    pub initramfs: Option<&'f File>,
    /// The user's part of the command line.
    pub command_line: &'f str,
    /// Guest memory in bytes.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u8,
}

impl Boot<'_> {
    /// Loads everything and gives the kernel's entry point.
    pub fn load(&self, memory: &GuestMemoryMmap) -> Result<u64, BootError> {
        let command_line = command_line(self.command_line)?;
        let plan = self.load_kernel(memory)?;
        let initramfs = match self.initramfs {
            Some(file) => Some(self.load_initramfs(memory, file, plan.end())?),
            None => None,
        };
        let params = boot_params::bytes(&boot_params::Boot {
            memory: self.memory,
            initramfs,
        });
        let (pointer, table) = mptable::tables(self.vcpus);
        let (first, second, third) = regs::page_tables();
        let pieces: [(u64, &[u8]); 8] = [
            (layout::GDT, &regs::gdt()),
            (layout::BOOT_PARAMS, &params),
            (layout::PAGE_TABLES[0], &first.to_le_bytes()),
            (layout::PAGE_TABLES[1], &second.to_le_bytes()),
            (layout::PAGE_TABLES[2], &third),
            (layout::COMMAND_LINE, command_line.as_bytes()),
            (layout::MP_TABLE, &table),
            (layout::MP_POINTER, &pointer),
        ];
        for (address, bytes) in pieces {
            let result = memory.write_slice(bytes, GuestAddress(address));
            result.map_err(|_| self.too_small("machine's description"))?;
        }
        Ok(plan.entry)
    }

    fn load_kernel(&self, memory: &GuestMemoryMmap) -> Result<elf::Plan, BootError> {
        let mut head = [0; elf::HEAD_BYTES];
        let read = std::os::unix::fs::FileExt::read_at(self.kernel, &mut head, 0);
        let length = read.map_err(|error| BootError::Read("kernel", error))?;
        let plan = elf::parse(head.get(..length).unwrap_or_default())?;
        for segment in &plan.segments {
            // What the kernel clears itself has to exist too.
            let size = usize::try_from(segment.memory).unwrap_or(usize::MAX);
            if segment.address < layout::HIGH_MEMORY
                || !GuestMemoryBackend::check_range(memory, GuestAddress(segment.address), size)
            {
                return Err(self.too_small("kernel"));
            }
            self.copy(
                "kernel",
                self.kernel,
                segment.offset,
                memory,
                segment.address,
                segment.length,
            )?;
        }
        Ok(plan)
    }

    /// Directly behind the kernel, in the rest of the huge page that the kernel's end takes anyway.
    fn load_initramfs(
        &self,
        memory: &GuestMemoryMmap,
        file: &File,
        kernel_end: u64,
    ) -> Result<(u32, u32), BootError> {
        let failed = |error| BootError::Read("initramfs", error);
        let length = file.metadata().map_err(failed)?.len();
        let room = self.memory.min(layout::LOW_MEMORY_END);
        let address = kernel_end.checked_next_multiple_of(PAGE);
        let address = address.filter(|address| {
            let end = address.checked_add(length);
            end.is_some_and(|end| end <= room)
        });
        let place = address
            .and_then(|address| Some((u32::try_from(address).ok()?, u32::try_from(length).ok()?)));
        let (address, length) = place.ok_or_else(|| self.too_small("initramfs"))?;
        self.copy("initramfs", file, 0, memory, address.into(), length.into())?;
        Ok((address, length))
    }

    fn copy(
        &self,
        what: &'static str,
        file: &File,
        mut offset: u64,
        memory: &GuestMemoryMmap,
        address: u64,
        length: u64,
    ) -> Result<(), BootError> {
        let size = usize::try_from(length).map_err(|_| self.too_small(what))?;
        let slice = memory.get_slice(GuestAddress(address), size);
        let mut rest = slice.map_err(|_| self.too_small(what))?;
        while !rest.is_empty() {
            let failed = |error| BootError::Read(what, error);
            let count = sys::read_at(file, &[rest], offset).map_err(failed)?;
            if count == 0 {
                return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
            }
            offset += count as u64;
            rest = rest
                .offset(count)
                .map_err(|error| failed(std::io::Error::other(error)))?;
        }
        Ok(())
    }

    fn too_small(&self, what: &'static str) -> BootError {
        BootError::Memory {
            what,
            mib: self.memory >> 20,
        }
    }
}

/// The whole command line, closed by a zero. What the machine needs stands first, so that it is
/// not taken for arguments of the guest's init, which a `--` separates.
fn command_line(of_the_user: &str) -> Result<String, BootError> {
    let mut line = String::from(BASICS);
    for window in 0..WINDOWS {
        let (address, pin) = (layout::window_address(window), layout::window_pin(window));
        line.push_str(&format!(
            " virtio_mmio.device=4K@{address:#x}:{pin}:{window}"
        ));
    }
    line.push(' ');
    line.push_str(of_the_user);
    if line.len() >= layout::COMMAND_LINE_BYTES || line.contains('\0') {
        return Err(BootError::CommandLine(line.len()));
    }
    line.push('\0');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_command_line_names_every_window_and_leaves_room_for_the_user() {
        let line = command_line("quiet -- argument").unwrap();
        assert!(line.ends_with(":23 quiet -- argument\0"));
        assert_eq!(
            line.matches("virtio_mmio.device=").count(),
            usize::from(WINDOWS)
        );
        assert!(line.contains("virtio_mmio.device=4K@0xd0013000:5:19 "));
        assert!(command_line(&"x".repeat(900)).is_ok());
        assert!(command_line(&"x".repeat(2000)).is_err());
    }

    fn load(kernel: &[u8], initramfs: &[u8], mib: u32) -> Result<u64, BootError> {
        let file = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            file
        };
        let memory = super::super::memory::create(mib).unwrap();
        let (kernel, initramfs) = (file(kernel), file(initramfs));
        let boot = Boot {
            kernel: &kernel,
            initramfs: Some(&initramfs),
            command_line: "",
            memory: u64::from(mib) << 20,
            vcpus: 1,
        };
        boot.load(&memory)
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let message = |result: Result<u64, BootError>| result.unwrap_err().to_string();
        assert!(message(load(b"no kernel", b"", 32)).contains("not an uncompressed"));
        let mut kernel = vec![0; 4096 + 512];
        kernel[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        (kernel[18], kernel[27], kernel[32], kernel[54], kernel[56]) = (62, 1, 64, 56, 1);
        kernel[64] = 1;
        kernel[64 + 9] = 16; // at 4096 of the file
        kernel[64 + 27] = 1; // to 16 MiB
        kernel[64 + 33] = 2; // 512 bytes
        kernel[64 + 43] = 1; // 16 MiB in memory
        assert_eq!(load(&kernel, b"initramfs", 64).unwrap(), 16 << 20);
        assert!(message(load(&kernel, b"initramfs", 32)).contains("initramfs does not fit"));
        kernel.truncate(4096);
        assert!(message(load(&kernel, b"", 64)).contains("kernel could not be read"));
    }
}
