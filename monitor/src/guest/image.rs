//! The firmware's ELF file: checked, then loaded.

use super::Error;
use goblin::elf::{Elf, header, program_header, sym};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use umbra_shared::layout::{IMAGE_END, IMAGE_START};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The firmware that is built with the monitor (see build.rs).
const BUILT_IN: &[u8] = include_bytes!(env!("UMBRA_FIRMWARE"));

/// A file may hold more than the guest's 5 MiB: symbols, and what a debugger wants. A device without an end is refused.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The symbol of the page tables that the firmware starts on.
const BOOT_TABLES: &str = "boot_pml4";

/// A checked image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Where the guest starts.
    pub entry: u64,
    /// What its CR3 holds then.
    pub boot_tables: u64,
    /// SHA-256 of the whole file, in hexadecimal.
    pub sha256: String,
    segments: Vec<Segment>,
    /// Functions by address.
    symbols: Vec<(u64, String)>,
}

#[derive(Clone, Debug)]
struct Segment {
    address: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// The firmware of the monitor itself, or the file that `--firmware` names.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub fn load(file: Option<&Path>) -> Result<Self, Error> {
        let Some(file) = file else { return Self::parse("(built in)", BUILT_IN) };
        let name = file.display().to_string();
        let wrong = |reason: String| Error::Image { name: name.clone(), reason };
        let mut bytes = Vec::new();
        let read = File::open(file).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes));
        read.map_err(|error| wrong(format!("{error} (name a readable ELF file)")))?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(wrong(format!("it is larger than {} MiB, which no firmware is", MAX_FILE_BYTES >> 20)));
        }
        Self::parse(&name, &bytes)
    }

    /// Checks a whole ELF file.
    ///
    /// # Errors
    /// [`Error::Image`] with what is wrong.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Image { name: name.to_owned(), reason };
        if !bytes.starts_with(header::ELFMAG) {
            return Err(wrong("not an ELF file (build one with the crate guest-fw)".into()));
        }
        let elf = Elf::parse(bytes).map_err(|error| wrong(format!("a broken ELF file, perhaps cut short: {error}")))?;
        if elf.header.e_machine != header::EM_X86_64 || !elf.is_64 {
            let machine = header::machine_to_str(elf.header.e_machine);
            return Err(wrong(format!("it is made for {machine}, and x86-64 is needed")));
        }
        if elf.header.e_type != header::ET_EXEC {
            return Err(wrong("it is not linked to fixed addresses (ET_EXEC is needed, see guest-fw/link.ld)".into()));
        }
        let segments = elf
            .program_headers
            .iter()
            .filter(|segment| segment.p_type == program_header::PT_LOAD && segment.p_memsz > 0)
            .map(|segment| load(segment, bytes).map_err(wrong))
            .collect::<Result<Vec<_>, _>>()?;
        let covers =
            |address: u64| segments.iter().any(|s| (s.address..s.address + s.bytes.len() as u64).contains(&address));
        if !covers(elf.entry) {
            return Err(wrong(format!("its entry {:#x} lies in no segment", elf.entry)));
        }
        let named = |wanted: &str| elf.syms.iter().find(|sym| elf.strtab.get_at(sym.st_name) == Some(wanted));
        let boot_tables = named(BOOT_TABLES)
            .map(|symbol| symbol.st_value)
            .filter(|&address| covers(address) && address % 4096 == 0)
            .ok_or_else(|| wrong(format!("it has no page-aligned symbol {BOOT_TABLES} (was it stripped?)")))?;
        let mut symbols: Vec<_> = elf
            .syms
            .iter()
            .filter(|sym| sym.st_type() == sym::STT_FUNC || (sym.st_type() == sym::STT_NOTYPE && covers(sym.st_value)))
            .filter_map(|sym| Some((sym.st_value, elf.strtab.get_at(sym.st_name)?.to_owned())))
            .filter(|(_, name)| !name.is_empty())
            .collect();
        symbols.sort();
        Ok(Self { entry: elf.entry, boot_tables, sha256: sha256(bytes), segments, symbols })
    }

    /// Writes the segments into the guest's system slot.
    ///
    /// # Errors
    /// [`Error::Memory`] if the slot is smaller than the image: the layout forbids it.
    pub fn write_to(&self, memory: &GuestMemoryMmap) -> Result<(), Error> {
        self.segments.iter().try_for_each(|segment| {
            memory
                .write_slice(&segment.bytes, GuestAddress(segment.address))
                .map_err(|error| Error::Memory(format!("the firmware does not fit its slot: {error}")))
        })
    }

    /// `symbol+offset` at `address`, or the bare number.
    #[must_use]
    pub fn place(&self, address: u64) -> String {
        let after = self.symbols.partition_point(|(start, _)| *start <= address);
        let mut text = format!("{address:#x}");
        if let Some((start, name)) = after.checked_sub(1).and_then(|index| self.symbols.get(index))
            && address < IMAGE_END
        {
            let _ = write!(text, " ({:#}+{:#x})", rustc_demangle::demangle(name), address - start);
        }
        text
    }
}

/// The hash of bytes, in hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn load(segment: &program_header::ProgramHeader, file: &[u8]) -> Result<Segment, String> {
    let end = segment.p_paddr.checked_add(segment.p_memsz);
    if segment.p_paddr < IMAGE_START || end.is_none_or(|end| end > IMAGE_END) {
        return Err(format!(
            "a segment at {:#x} of {:#x} bytes lies outside the firmware's place, {IMAGE_START:#x} to {IMAGE_END:#x}",
            segment.p_paddr, segment.p_memsz
        ));
    }
    let start = usize::try_from(segment.p_offset).ok();
    let length = usize::try_from(segment.p_filesz).ok();
    let source = start.zip(length).and_then(|(start, length)| file.get(start..start.checked_add(length)?));
    let source = source.ok_or("a segment lies beyond the file's end: the file was cut short")?;
    let mut bytes = source.to_vec();
    // p_memsz is below IMAGE_END, checked above.
    bytes.resize(usize::try_from(segment.p_memsz).unwrap_or(0).max(source.len()), 0);
    if bytes.len() as u64 != segment.p_memsz {
        return Err("a segment holds more bytes in the file than in memory".into());
    }
    Ok(Segment { address: segment.p_paddr, bytes })
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_firmware_is_one() {
        let image = Image::load(None).unwrap();
        assert!(image.place(image.entry).contains("+0x0"), "{}", image.place(image.entry));
        assert_eq!(image.sha256.len(), 64);
    }

    fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut bytes = BUILT_IN.to_vec();
        change(&mut bytes);
        Image::parse("x.elf", &bytes).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_firmware_is_refused_with_the_reason() {
        assert!(refusal(|bytes| bytes.truncate(0)).contains("not an ELF file"));
        assert!(refusal(|bytes| bytes.truncate(40)).contains("broken ELF"));
        // The machine is the u16 at offset 18 of the header: 183 is AArch64.
        assert!(refusal(|bytes| bytes[18] = 183).contains("AARCH64"));
        // The type is the u16 at 16: 3 is ET_DYN.
        assert!(refusal(|bytes| bytes[16] = 3).contains("fixed addresses"));
        // The entry is the u64 at 24.
        assert!(refusal(|bytes| bytes[24..32].copy_from_slice(&0x10_u64.to_le_bytes())).contains("entry 0x10"));
        let table = usize::try_from(u64::from_le_bytes(BUILT_IN[32..40].try_into().unwrap())).unwrap();
        for index in 0..usize::from(BUILT_IN[56]) {
            let at = table + 56 * index;
            if BUILT_IN[at..at + 4] == [1, 0, 0, 0] {
                // p_paddr at 24, p_offset at 8 of a program header.
                let outside = refusal(|bytes| bytes[at + 24..at + 32].copy_from_slice(&0x8000_0000_u64.to_le_bytes()));
                assert!(outside.contains("outside the firmware's place"), "{outside}");
                let cut = refusal(|bytes| bytes[at + 8..at + 16].copy_from_slice(&0x7000_0000_u64.to_le_bytes()));
                assert!(cut.contains("cut short"), "{cut}");
            }
        }
    }

    #[test]
    fn no_cut_of_the_file_panics() {
        for length in (0..BUILT_IN.len()).step_by(97) {
            let _ = Image::parse("x.elf", &BUILT_IN[..length]);
        }
    }
}
