//! The library of the native operators: docs/native.md.

use std::env;
use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::ffi::OsStr;
use std::path::{Path, PathBuf, absolute};

use crate::errors::{Error, Result};

/// How an error about their lack ends.
pub const LACKING: &str = "which are not beside this program; name their library by --operators, or export again with \
                           --operators stock";

/// The library that is given, else the one beside this program, if there is one. A `DeviceError` where there is no
/// file.
pub fn find(given: Option<&OsStr>) -> Result<Option<PathBuf>> {
    let name = format!("{DLL_PREFIX}phimoe_operators{DLL_SUFFIX}");
    if let Some(given) = given {
        let path = Path::new(given);
        if path.is_file() {
            return Ok(Some(absolute(path).unwrap_or(path.into()))); // a bare name would be looked for elsewhere
        }
        let given = path.display();
        return Err(Error::Device(format!("--operators is {given}, where there is no file; expected that of {name}")));
    }
    let beside = env::current_exe().ok().map(|program| program.with_file_name(name));
    Ok(beside.filter(|path| path.is_file()))
}
