//! Builds a machine from its description.

use std::fs::File;
use std::sync::Arc;

use bulkhead_vmm_api::{Device as Description, VmConfig, WINDOWS};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Machine;
use super::boot::{Boot, BootError};
use super::ending::Ending;
use super::memory::{self, MemoryError};
use super::vcpu::Vcpus;
use super::wires::KvmWires;
use crate::arch::x86_64::{cpuid, layout, msr, regs};
use crate::control::{Announcer, Control, Peer};
use crate::device::bus::Bus;
use crate::device::console::Console;
use crate::device::serial::Serial;
use crate::device::virtio::Device;
use crate::device::virtio::blk::{Blk, Disk, Piece};
use crate::device::virtio::mmio::{AttachError, Window};
use crate::device::virtio::net::Net;
use crate::device::virtio::rng::Rng;
use crate::device::virtio::vsock::Vsock;
use crate::files::{Files, FilesError};
use crate::sys;

/// Why a machine could not be built. Each reads on from "the VM could not be started".
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// A KVM call failed.
    #[error("KVM could not {0}: {1}")]
    Kvm(&'static str, String),
    /// The host's KVM lacks something.
    #[error("the host's KVM does not offer {0}, which needs Linux 6.1 on a 64-bit processor")]
    Capability(&'static str),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A descriptor is missing.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A device could not be made.
    #[error("the {0} could not be made: {1}")]
    Device(&'static str, std::io::Error),
    /// A device could not be put into its window.
    #[error("device {window} could not be put into its window: {source}")]
    Attach {
        /// Which window.
        window: u8,
        /// Why.
        source: AttachError,
    },
}

fn kvm_failed(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> AssembleError {
    move |error| AssembleError::Kvm(step, error.to_string())
}

/// Builds the machine and lets its guest run.
pub fn start(
    config: &VmConfig,
    mut files: Files,
    console: Console,
) -> Result<Machine, AssembleError> {
    let kvm = sys::kvm(files.take(config.kvm, "KVM")?);
    let kernel = File::from(files.take(config.kernel, "kernel")?);
    let initramfs = config
        .initramfs
        .map(|fd| files.take(fd, "initramfs"))
        .transpose()?;
    let initramfs = initramfs.map(File::from);
    let listener = files.take(config.control, "control socket")?;

    let memory = memory::create(config.memory_mib)?;
    let vm = Arc::new(create_vm(&kvm, &memory)?);
    let bytes = u64::from(config.memory_mib) << 20;
    let boot = Boot {
        kernel: &kernel,
        initramfs: initramfs.as_ref(),
        command_line: &config.command_line,
        memory: bytes,
        vcpus: config.vcpus,
    };
    let entry = boot.load(&memory)?;
    let vcpus = create_vcpus(&kvm, &vm, config.vcpus, entry)?;

    let wires = Arc::new(KvmWires::new(vm.clone()));
    let windows: Vec<Window> = (0..WINDOWS)
        .map(|window| {
            let (address, pin) = (layout::window_address(window), layout::window_pin(window));
            Window::new(address, pin, memory.clone(), wires.clone())
        })
        .collect();

    let peer = Arc::new(Peer::default());
    let (vsock, answers) = Vsock::new(config.guest_cid, Box::new(Announcer(peer.clone())))
        .map_err(|error| AssembleError::Device("vsock device", error))?;
    let control = Control::new(listener, peer, answers)
        .map_err(|error| AssembleError::Device("control socket", error))?;
    let mut devices: Vec<Box<dyn Device>> = vec![Box::new(vsock), Box::new(Rng)];
    for description in &config.devices {
        devices.push(device(description, &mut files)?);
    }
    for ((number, window), device) in (0..).zip(&windows).zip(devices) {
        let failed = |source| AssembleError::Attach {
            window: number,
            source,
        };
        window.attach(device).map_err(failed)?;
    }

    let bus = Arc::new(Bus::new(serial(&vm, console.clone())?, windows));
    let ending = Ending::new().map_err(|error| AssembleError::Device("end event", error))?;
    let vcpus = Vcpus::start(vcpus, &bus, &ending)
        .map_err(|error| AssembleError::Device("vCPU threads", error))?;
    Ok(Machine {
        vcpus,
        bus,
        console,
        ending,
        control: Some(control),
        _vm: vm,
    })
}

/// Makes the device that is described; its files are named by numbers in `files`.
pub fn device(
    description: &Description,
    files: &mut Files,
) -> Result<Box<dyn Device>, AssembleError> {
    match description {
        Description::Block(block) => {
            let piece = |extent: &bulkhead_vmm_api::Extent| {
                let file = files.extent(extent.file)?;
                Ok(Piece {
                    file,
                    offset: extent.offset,
                    length: extent.length,
                })
            };
            let pieces: Result<_, FilesError> = block.extents.iter().map(piece).collect();
            Ok(Box::new(Blk::new(Disk::new(
                &block.serial,
                block.read_only,
                pieces?,
            ))))
        }
        Description::Net(net) => {
            let taps = std::iter::once(net.tap).chain(net.more_taps.iter().copied());
            let taps: Result<_, FilesError> = taps
                .map(|tap| files.take(tap, "tap of a network interface"))
                .collect();
            let net = Net::new(taps?, net.mac, net.mtu)
                .map_err(|error| AssembleError::Device("network interface", error))?;
            Ok(Box::new(net))
        }
    }
}

fn create_vm(kvm: &Kvm, memory: &GuestMemoryMmap) -> Result<VmFd, AssembleError> {
    let vm = kvm
        .create_vm()
        .map_err(kvm_failed("create a VM; is the descriptor /dev/kvm?"))?;
    if !kvm.check_extension(Cap::TscDeadlineTimer) {
        return Err(AssembleError::Capability("the TSC deadline timer"));
    }
    for (slot, region) in (0..).zip(memory.iter()) {
        sys::add_memory(&vm, slot, region)
            .map_err(|why| AssembleError::Kvm("take the guest's memory", why))?;
    }
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(kvm_failed("place its own pages"))?;
    vm.create_irq_chip()
        .map_err(kvm_failed("make the interrupt controllers"))?;
    Ok(vm)
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8, entry: u64) -> Result<Vec<VcpuFd>, AssembleError> {
    let mut supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_failed("tell the processor's features"))?;
    let msrs = msr::boot().map_err(|e| AssembleError::Kvm("list registers", format!("{e:?}")))?;
    let mut vcpus = Vec::with_capacity(count.into());
    for id in 0..count {
        let vcpu = vm
            .create_vcpu(id.into())
            .map_err(kvm_failed("make a vCPU"))?;
        cpuid::adapt(&mut supported, id, count);
        vcpu.set_cpuid2(&supported)
            .map_err(kvm_failed("set a vCPU's features"))?;
        let set = vcpu
            .set_msrs(&msrs)
            .map_err(kvm_failed("set a vCPU's registers"))?;
        if set != msrs.as_slice().len() {
            return Err(AssembleError::Capability("a register for the memory type"));
        }
        // The others wait for the guest to start them.
        if id == 0 {
            let mut special = vcpu
                .get_sregs()
                .map_err(kvm_failed("tell a vCPU's special registers"))?;
            regs::special(&mut special);
            vcpu.set_sregs(&special)
                .map_err(kvm_failed("set a vCPU's special registers"))?;
            vcpu.set_regs(&regs::general(entry))
                .map_err(kvm_failed("set a vCPU's general registers"))?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn serial(vm: &VmFd, console: Console) -> Result<Serial, AssembleError> {
    let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|error| AssembleError::Device("serial port", error))?;
    vm.register_irqfd(&line, layout::SERIAL_PIN)
        .map_err(kvm_failed("connect the serial port"))?;
    Ok(Serial::new(line, console))
}
