//! The files of a bundle, held against its manifest.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::errors::{Error, Result};
use crate::manifest::{MANIFEST, Manifest};

const HASH_LIMIT: u64 = 256 << 20; // bytes; hashing 20 GB takes longer than loading them

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
