//! The image that the lab machine boots: Umbra as /init, the modules, the jobs. The same contents give the same bytes, whatever
//! the files' times, owners and places were: under the instruction clock the image's bytes are part of the result.

use super::digest;
use cpio::newc;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;

/// Directories that PID 1 mounts on. Those that files lie in are added.
const MOUNT_POINTS: [&str; 4] = ["dev", "proc", "sys", "tmp"];

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const PLAIN: u32 = 0o100_644;

/// An image.
pub struct Image {
    /// The cpio archive (newc).
    pub bytes: Vec<u8>,
    /// Its SHA-256.
    pub sha256: String,
}

/// Builds the image. `files` are paths (without a leading slash) with their contents.
///
/// # Errors
/// A file of 4 GiB or more, which the format cannot hold.
pub fn build(init: &[u8], files: &BTreeMap<String, Vec<u8>>) -> std::io::Result<Image> {
    // Sorted, so a directory comes before what lies in it.
    let mut directories = BTreeSet::from(MOUNT_POINTS);
    for name in files.keys() {
        directories.extend(name.match_indices('/').map(|(at, _)| &name[..at]));
    }
    let directories = directories.into_iter().map(|name| (name, DIRECTORY, &[][..]));
    let files = files.iter().map(|(name, bytes)| (name.as_str(), PLAIN, &bytes[..]));
    let mut archive = Vec::new();
    for (inode, (name, mode, bytes)) in (1..).zip(directories.chain([("init", EXECUTABLE, init)]).chain(files)) {
        let length = u32::try_from(bytes.len()).map_err(std::io::Error::other)?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let entry = newc::Builder::new(name).mode(mode).ino(inode).nlink(links).uid(0).gid(0).mtime(0);
        let mut writer = entry.write(archive, length);
        writer.write_all(bytes)?;
        archive = writer.finish()?;
    }
    let bytes = newc::trailer(archive)?;
    let sha256 = digest::of(&bytes);
    Ok(Image { bytes, sha256 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    fn files() -> BTreeMap<String, Vec<u8>> {
        BTreeMap::from([("umbra/modules/kvm.ko".into(), b"kvm".to_vec()), ("umbra/plan.json".into(), b"{}".to_vec())])
    }

    #[test]
    fn the_same_contents_give_the_same_bytes() {
        let image = build(b"init", &files()).unwrap();
        assert_ne!(build(b"Init", &files()).unwrap().sha256, image.sha256);
        // Held to the digit: whatever changes the archive's layout moves every figure, so it has to be seen.
        assert_eq!(image.sha256, "cf857134391b489517d185ff0b95ad5c227e132de67681110eb8431800df8627");
    }

    #[test]
    fn the_archive_holds_what_was_put_in() {
        let image = build(b"init", &files()).unwrap();
        let mut rest = &image.bytes[..];
        let mut seen = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            let entry = reader.entry();
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            seen.push((entry.name().to_owned(), entry.mode(), bytes));
            rest = reader.finish().unwrap();
        }
        assert_eq!(seen.len(), MOUNT_POINTS.len() + 5);
        assert!(seen.contains(&("init".into(), EXECUTABLE, b"init".to_vec())));
        assert!(seen.contains(&("umbra/plan.json".into(), PLAIN, b"{}".to_vec())));
        // The kernel makes nothing for a file whose directory comes after it.
        for (at, (name, ..)) in seen.iter().enumerate() {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(seen[..at].iter().any(|(earlier, mode, _)| earlier == parent && *mode == DIRECTORY), "{name}");
            }
        }
    }
}
