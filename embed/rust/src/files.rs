//! The files of a bundle, held against its manifest.

use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::path::Path;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::errors::{Error, Result};
use crate::manifest::{MANIFEST, Manifest, read_manifest};

const HASH_LIMIT: u64 = 256 << 20; // bytes; hashing 20 GB takes longer than loading them

/// The manifest, for a function that opens the bundle's files by their names: they are all of one bundle then. A
/// `BundleError` where by its end other files have these names; whatever it failed with may come of that.
pub fn unchanged<T>(folder: &Path, open: impl FnOnce(&Manifest) -> Result<T>) -> Result<(Manifest, T)> {
    let manifest = read_manifest(folder)?;
    let before = identities(folder, &manifest);
    let opened = open(&manifest);
    let same = read_manifest(folder).is_ok_and(|now| now.files == manifest.files); // other keys may have changed
    if !same || identities(folder, &manifest) != before {
        return Err(Error::Bundle(format!("{}: was changed while it was read; try again", folder.display())));
    }
    Ok((manifest, opened?))
}

/// What tells each of the manifest's files from another of the same name: its size, its time and, where there is one, its
/// number; None for no file.
fn identities(folder: &Path, manifest: &Manifest) -> Vec<Option<(u64, Option<SystemTime>, u64)>> {
    let identity = |status: Metadata| (status.len(), status.modified().ok(), number(&status));
    manifest.files.keys().map(|name| fs::metadata(folder.join(&name.0)).ok().map(identity)).collect()
}

#[cfg(unix)]
fn number(status: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(status)
}

#[cfg(not(unix))]
fn number(_: &Metadata) -> u64 {
    0
}

/// Every size, and the hashes of files up to `HASH_LIMIT`; a `BundleError` names the file.
pub fn check_files(folder: &Path, manifest: &Manifest) -> Result<()> {
    for (name, expected) in &manifest.files {
        let path = folder.join(&name.0);
        let say = |what: String| Error::Bundle(format!("{}: {what}; copy or export the bundle again", path.display()));
        let size = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            _ => return Err(say("is missing".into())),
        };
        if size != expected.size {
            return Err(say(format!("has {size} bytes, {MANIFEST} says {}", expected.size)));
        }
        let hash = if size <= HASH_LIMIT { Some(sha256(&path)) } else { None };
        match hash.transpose().map_err(|error| say(format!("cannot be read ({error})")))? {
            Some(hash) if hash != expected.sha256 => {
                return Err(say(format!("its SHA-256 is not the one in {MANIFEST}, so it was changed")));
            }
            _ => {}
        }
    }
    Ok(())
}

/// In hexadecimal.
fn sha256(path: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut chunk) = (fs::File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => hash.update(&chunk[..count]),
        }
    }
}
