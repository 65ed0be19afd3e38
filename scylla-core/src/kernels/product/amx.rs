//! Blocks of a product on AMX: tiles of sixteen rows of sixteen pairs of bf16, multiplied and added up in f32.
//!
//! The compiler has no stable names for these instructions, so they stand in assembly. The tile registers belong to no
//! one else: a task configures them when it begins and releases them when it ends.

use std::ops::Range;

use super::{Block, Part, Target};

#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
mod tiles {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    use std::sync::OnceLock;

    use super::super::super::simd::{InstructionSet, Line};

    /// Whether the processor has AMX with bf16 and the system lets this process use it.
    pub(in super::super) fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            let capped = std::env::var_os("SCYLLA_SIMD").is_some();
            !capped && InstructionSet::detect() == InstructionSet::Avx512Bf16 && permitted()
        })
    }

    #[target_feature(enable = "xsave")]
    fn tile_state() -> bool {
        // SAFETY: the caller saw that the system has enabled this instruction.
        (unsafe { _xgetbv(0) }) >> 17 & 3 == 3
    }

    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        const OSXSAVE: u32 = 1 << 27;
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let features = __cpuid_count(7, 0).edx;
        if features & AMX_BF16 == 0 || features & AMX_TILE == 0 || __cpuid(1).ecx & OSXSAVE == 0 {
            return false;
        }
        // SAFETY: OSXSAVE was seen, so the processor has `xgetbv`.
        if !unsafe { tile_state() } {
            return false;
        }
        // SAFETY: a request for permission, which changes nothing else; all threads of the process get it.
        (unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) }) == 0
    }

    /// Configures eight tiles of sixteen rows of 64 bytes.
    ///
    /// # Safety
    /// Where [`available`]; to be followed by [`release`] on this thread.
    pub(super) unsafe fn configure() {
        let mut config = [0u8; 64];
        config[0] = 1;
        for tile in 0..8 {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        // SAFETY: palette 1 with sizes within its limits.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config.as_ptr(), options(nostack, readonly)) };
    }

    /// Gives the tiles back.
    ///
    /// # Safety
    /// Where [`available`].
    pub(super) unsafe fn release() {
        // SAFETY: no tile is in use behind this.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// Asks for the lines of a block of 32 x 32 values, to be written: they come while it is computed.
    ///
    /// # Safety
    /// Where [`available`]. Nothing is read or written.
    pub(super) unsafe fn ask_for(out: *mut f32, stride: usize) {
        for row in 0..32 {
            let line = out.wrapping_byte_add(row * stride);
            // SAFETY: a hint, which is ignored where there is no memory.
            unsafe {
                asm!(
                    "prefetchw [{0}]",
                    "prefetchw [{0} + 64]",
                    in(reg) line,
                    options(nostack, preserves_flags),
                )
            };
        }
    }

    /// Adds the product of two tiles of rows and two of columns, over `steps` steps of 32 values, to a block of 32 x 32
    /// values; `add` says whether what is there counts.
    ///
    /// # Safety
    /// After [`configure`]; the sides hold `steps` tiles each, and the block has 32 rows `stride` bytes apart.
    #[inline(always)]
    pub(super) unsafe fn block(
        left: [*const Line; 2],
        right: [*const Line; 2],
        steps: usize,
        out: *mut f32,
        stride: usize,
        add: bool,
    ) {
        let below = out.wrapping_byte_add(16 * stride);
        /// The whole of it, behind what stands in the sums when it begins.
        macro_rules! with {
            ($($begin:literal),+) => {
                asm!(
                    $($begin,)+
                    "2:",
                    "tileloadd tmm4, [{a0} + {line}*1]",
                    "tileloadd tmm6, [{b0} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b1} + {line}*1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a1} + {line}*1]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a0}, 1024",
                    "add {a1}, 1024",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{o} + {s}*1], tmm0",
                    "tilestored [{o} + {s}*1 + 64], tmm1",
                    "tilestored [{b} + {s}*1], tmm2",
                    "tilestored [{b} + {s}*1 + 64], tmm3",
                    a0 = inout(reg) left[0] => _, a1 = inout(reg) left[1] => _,
                    b0 = inout(reg) right[0] => _, b1 = inout(reg) right[1] => _,
                    n = inout(reg) steps => _, line = in(reg) 64usize,
                    o = in(reg) out, b = in(reg) below, s = in(reg) stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        // SAFETY: the caller's.
        unsafe {
            match add {
                true => with!(
                    "tileloadd tmm0, [{o} + {s}*1]",
                    "tileloadd tmm1, [{o} + {s}*1 + 64]",
                    "tileloadd tmm2, [{b} + {s}*1]",
                    "tileloadd tmm3, [{b} + {s}*1 + 64]"
                ),
                false => with!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3"
                ),
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
pub(super) use tiles::available;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
pub(super) fn available() -> bool {
    false
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
pub(super) fn run(_: &Block<'_>, _: &Part<'_>, _: Range<usize>, _: &Target<'_>) {
    unreachable!("there is no AMX here")
}

/// Lines of K that pass together, at most: eighteen steps of 32 values, of which a panel stays in the first cache while tiles
/// of columns come from the second.
pub(super) const LINES: usize = 18 * super::TILE;

/// Computes the output of a part's panels of 32 rows and some tiles of columns.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
pub(super) fn run(block: &Block<'_>, part: &Part<'_>, columns: Range<usize>, target: &Target<'_>) {
    assert!(available() && block.units.amx);
    // SAFETY: available; released below, and nothing between panics: what is indexed was checked when it was packed.
    unsafe { tiles::configure() };
    // Along the rows: the output's pages change least, and what is written next lies beside.
    for panel in 0..part.panels {
        for tile in columns.clone().step_by(2) {
            one(block, part, panel, tile, target);
        }
    }
    // SAFETY: available.
    unsafe { tiles::release() };
}

/// One panel of 32 rows and two tiles of columns.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
#[inline(always)]
fn one(block: &Block<'_>, part: &Part<'_>, panel: usize, tile: usize, target: &Target<'_>) {
    use super::super::TILE;
    let (count, add) = (part.lines.len(), part.add);
    let side =
        |data: &[super::super::simd::Line], first: usize| data[first..first + count].as_ptr();
    let left = [0, 1].map(|half| side(part.left, panel * part.room + half * count));
    let right = [0, 1].map(|half| {
        let first = (tile + half) * block.right.lines;
        side(&block.right.data, first + part.lines.start)
    });
    let steps = count / TILE;
    let (row, column) = ((part.panel + panel) * 32, tile * TILE);
    let (rows, wide) = ((block.m - row).min(32), (block.n - column).min(32));
    let at = target.at(row, column);
    if rows == 32 && wide == 32 {
        // SAFETY: this block's values are within the target (its last one is asked for) and written by this thread alone.
        unsafe {
            let last = at + 31 * target.stride + 31;
            let _ = target.values.part(last..last + 1);
            let out = target.values.data.add(at);
            tiles::ask_for(out, target.stride * 4);
            tiles::block(left, right, steps, out, target.stride * 4, add);
        }
        return;
    }
    // The same sums through a block of their own, so that where the output ends does not decide how they round.
    let mut whole = [[0.0f32; 32]; 32];
    let row_of = |r: usize| at + r * target.stride..at + r * target.stride + wide;
    if add {
        for (r, to) in whole.iter_mut().enumerate().take(rows) {
            // SAFETY: rows and columns of this block, which this thread alone writes.
            to[..wide].copy_from_slice(unsafe { target.values.part(row_of(r)) });
        }
    }
    // SAFETY: 32 rows of 128 bytes.
    unsafe { tiles::block(left, right, steps, whole.as_mut_ptr().cast(), 128, add) };
    for (r, found) in whole.iter().enumerate().take(rows) {
        // SAFETY: as above.
        unsafe { target.values.part(row_of(r)) }.copy_from_slice(&found[..wide]);
    }
}
