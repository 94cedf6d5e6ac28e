//! What the bed is made of: QEMU, a file server for the host's root, a kernel with the real
//! `kvm_amd`, and the initramfs that finds its way to the host's root.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::emulator::Emulator;
use crate::cpio::Archive;
use crate::{packages, place, process};

const PURPOSE: &str = "the bed";

/// Modules the first stage loads (with what they depend on), in this order. The rest is found by
/// modprobe, also when the kernel asks for it.
const MODULES: &[&str] = &["overlay", "kvm-amd", "tun"];

/// The parts, ready to start.
pub struct Parts {
    /// QEMU.
    pub emulator: Emulator,
    /// The file server (C virtiofsd).
    pub virtiofsd: PathBuf,
    /// The kernel's ELF.
    pub kernel: PathBuf,
    /// The directory that holds `<release>/` with the kernel's modules, unpacked.
    pub modules: PathBuf,
    release: String,
}

/// Finds the parts in the cache, or fetches and unpacks them.
pub fn prepare() -> Result<Parts> {
    if !packages::root() {
        bail!("the bed shares this machine's whole root directory and must be started by root");
    }
    let cache = place::cache("bed")?;
    let lock = File::create(cache.join("lock"))?;
    lock.lock().context("cannot lock the bed's cache")?;
    packages::install(PURPOSE, &["busybox-static", "kmod", "xz-utils", "zstd"])?;
    let emulator = Emulator::prepare(&cache)?;
    let virtiofsd = virtiofsd(&cache)?;
    let (release, kernel) = kernel(&cache)?;
    Ok(Parts {
        emulator,
        virtiofsd,
        kernel: kernel.join("vmlinux"),
        modules: kernel.join("lib/modules"),
        release,
    })
}

impl Parts {
    /// The initramfs: both stages, busybox, modules, the command (a shell script) and settings.
    pub fn initramfs(&self, command: &str, settings: &str) -> Result<Vec<u8>> {
        let read =
            |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let stages = place::checkout().join("tests/bed");
        let mut archive = Archive::new();
        for name in [
            "bin", "dev", "host", "modules", "proc", "root", "sys", "upper",
        ] {
            archive.directory(name, 0o755);
        }
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, &read(&stages.join("init"))?);
        archive.file("second-stage", 0o755, &read(&stages.join("second-stage"))?);
        archive.file("bin/busybox", 0o755, &read(Path::new("/bin/busybox"))?);
        archive.file("command", 0o755, command.as_bytes());
        archive.file("settings", 0o644, settings.as_bytes());
        let mut order = String::new();
        for module in self.module_files()? {
            let name = module
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            archive.file(&format!("modules/{name}"), 0o644, &read(&module)?);
            order += &format!("{name}\n");
        }
        archive.file("modules/order", 0o644, order.as_bytes());
        Ok(archive.finish())
    }

    /// The files of [`MODULES`] and of what they need, in the order of loading.
    fn module_files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for module in MODULES {
            let root = self.modules.ancestors().nth(2).unwrap_or(Path::new("/"));
            let plan = process::capture_text(Command::new("modprobe").arg("-d").arg(root).args([
                "-S",
                &self.release,
                "--show-depends",
                module,
            ]))?;
            for line in plan.lines() {
                if let Some(path) = line.strip_prefix("insmod ") {
                    let path = PathBuf::from(path.trim());
                    if !files.contains(&path) {
                        files.push(path);
                    }
                }
            }
        }
        Ok(files)
    }
}

/// The first number of a Debian version, its epoch aside.
fn major(version: &str) -> u32 {
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    let digits: String = upstream.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// The file server: the C virtiofsd, which only Debian 12's own qemu-system-common has. It is
/// unpacked, never installed.
fn virtiofsd(cache: &Path) -> Result<PathBuf> {
    let server = cache.join("virtiofsd/usr/lib/qemu/virtiofsd");
    if server.exists() {
        return Ok(server);
    }
    packages::install(
        PURPOSE,
        &["libcap-ng0", "libseccomp2", "libglib2.0-0", "libnuma1"],
    )?;
    let known =
        || process::capture_text(Command::new("apt-cache").args(["madison", "qemu-system-common"]));
    let pick = |table: &str| {
        table
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(|version| version.trim().to_owned())
            .find(|version| major(version) == 7)
    };
    let version = match pick(&known()?) {
        Some(version) => version,
        None => {
            packages::update()?;
            pick(&known()?).context("no package qemu-system-common 7.2 (Debian 12) to be had")?
        }
    };
    eprintln!("bed: fetching virtiofsd (qemu-system-common {version})");
    let package = format!("qemu-system-common={version}");
    unpack(&package, cache, &cache.join("virtiofsd"), |_| Ok(()))?;
    if !server.exists() {
        bail!("the package {package} has no virtiofsd");
    }
    Ok(server)
}

/// The newest 6.12 kernel for clouds in the cache, else the newest Debian offers; its release and
/// directory.
fn kernel(cache: &Path) -> Result<(String, PathBuf)> {
    let kernels = cache.join("kernel");
    fs::create_dir_all(&kernels)?;
    let mut cached = Vec::new();
    for entry in fs::read_dir(&kernels)? {
        cached.push(entry?.file_name().to_string_lossy().into_owned());
    }
    if let Some(release) = newest(cached.iter().map(String::as_str)) {
        return Ok((release.to_owned(), kernels.join(release)));
    }
    let offered = || {
        process::capture_text(Command::new("apt-cache").args([
            "search",
            "--names-only",
            r"^linux-image-6\.12\.[^ ]*-cloud-amd64$",
        ]))
    };
    let pick = |list: &str| {
        let releases = list
            .lines()
            .filter_map(|line| line.split(' ').next()?.strip_prefix("linux-image-"));
        newest(releases).map(str::to_owned)
    };
    let release = match pick(&offered()?) {
        Some(release) => release,
        None => {
            packages::backports()?;
            pick(&offered()?).context("no package linux-image-6.12…-cloud-amd64 to be had")?
        }
    };
    let directory = kernels.join(&release);
    eprintln!("bed: fetching Debian's kernel {release}");
    unpack(
        &format!("linux-image-{release}"),
        cache,
        &directory,
        |root| {
            let image = fs::read(root.join(format!("boot/vmlinuz-{release}")))?;
            fs::write(root.join("vmlinux"), elf(&image)?)?;
            // Emulated CPUs take long to inflate modules.
            let script = "find lib/modules -name '*.ko.xz' -print0 | xargs -0 -r -n 64 unxz";
            process::capture(Command::new("sh").args(["-c", script]).current_dir(root))?;
            process::capture(Command::new("depmod").arg("-b").arg(root).arg(&release))?;
            Ok(())
        },
    )?;
    Ok((release, directory))
}

/// The newest of kernel releases like `6.12.90+deb12.1-cloud-amd64`, by their numbers.
fn newest<'a>(releases: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    releases
        .filter(|release| release.ends_with("-cloud-amd64"))
        .max_by_key(|release| {
            release
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|number| number.parse::<u64>().ok())
                .collect::<Vec<_>>()
        })
}

/// Fetches `package`, unpacks it, lets `finish` complete it, and puts it at `target` in one step.
fn unpack(
    package: &str,
    cache: &Path,
    target: &Path,
    finish: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let partial = cache.join("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    let root = partial.join("root");
    fs::create_dir_all(&root)?;
    packages::download(package, &partial)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(&partial)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            files.push(path);
        }
    }
    let [file] = files.as_slice() else {
        bail!("apt-get download {package} left no package")
    };
    process::capture(Command::new("dpkg").arg("-x").arg(file).arg(&root))?;
    finish(&root)?;
    fs::rename(&root, target)
        .with_context(|| format!("cannot put {package} at {}", target.display()))?;
    fs::remove_dir_all(&partial)?;
    Ok(())
}

/// The ELF inside a bzImage (Documentation/arch/x86/boot.rst: `setup_sects`, `payload_offset`,
/// `payload_length`): booted directly it saves the emulated CPUs its decompression.
fn elf(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let payload = || {
        let sectors = usize::from(*image.get(0x1f1)?);
        let start = (sectors + 1) * 512 + word(0x248)?;
        image.get(start..start.checked_add(word(0x24c)?)?)
    };
    let payload = payload().context("the kernel image is no bzImage")?;
    let packer = match payload.get(..4) {
        Some([0x1f, 0x8b, ..]) => "gzip",
        Some([0xfd, b'7', b'z', b'X']) => "xz",
        Some([0x28, 0xb5, 0x2f, 0xfd]) => "zstd",
        _ => bail!("the kernel image is packed in an unknown way"),
    };
    // All but gzip carry the unpacked length behind the stream.
    let stream = if packer == "gzip" {
        payload
    } else {
        &payload[..payload.len() - 4]
    };
    let elf = process::filter(Command::new(packer).arg("-dc"), stream)?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("the kernel image holds no ELF");
    }
    Ok(elf)
}

#[cfg(test)]
mod tests {
    use super::{elf, major, newest};

    #[test]
    fn releases_are_compared_by_number() {
        let releases = [
            "6.12.90+deb12-cloud-amd64",
            "6.12.117+deb12-cloud-amd64",
            "6.12.90+deb12.1-cloud-amd64",
            "6.12.9+bpo-cloud-amd64",
            "6.12.200+deb12-rt-amd64",
        ];
        assert_eq!(
            newest(releases.into_iter()),
            Some("6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(
            newest(releases[2..4].iter().copied()),
            Some("6.12.90+deb12.1-cloud-amd64")
        );
        assert_eq!(newest(std::iter::empty()), None);
    }

    #[test]
    fn the_epoch_is_not_the_major_version() {
        assert_eq!(major("1:7.2+dfsg-7+deb12u18"), 7);
        assert_eq!(major("1:10.0.2+ds-2"), 10);
        assert_eq!(major("8.1"), 8);
    }

    #[test]
    fn what_is_no_kernel_image_is_refused() {
        assert!(elf(b"").is_err());
        let mut image = vec![0xff; 2048];
        assert!(elf(&image).is_err(), "offsets beyond the file");
        image[0x1f1] = 0;
        image[0x248..0x24c].fill(0);
        image[0x24c..0x250].copy_from_slice(&64u32.to_le_bytes());
        assert!(elf(&image).is_err(), "unknown packer");
    }
}
