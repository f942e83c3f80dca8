//! Keeps the library in the process once it is loaded.

fn main() {
    // a program that closes its session options unloads their library, and a session may still run its code
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
