//! Memory that will be read soon.

/// Asks for the cache's line with an address, be it there or not. A processor that does not look ahead far enough by
/// itself waits for memory otherwise.
#[inline(always)]
pub(crate) fn ask(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every processor of this architecture has the instruction, which reads nothing that a program sees.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
