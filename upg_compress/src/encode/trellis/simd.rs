//! [`forward::run`] compiled for several instruction sets, chosen at run time.

use super::forward::{self, Front, Stretch};

/// One of the compiled variants. A value is the proof that this machine can run it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// All variants that this machine can run, the fastest one last. All of them give the same
    /// result.
    pub fn available() -> Vec<Self> {
        let sets = [
            (Set::Portable, true),
            #[cfg(target_arch = "x86_64")]
            (Set::Avx2, is_x86_feature_detected!("avx2")),
            #[cfg(target_arch = "x86_64")]
            (
                Set::Avx512,
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl"),
            ),
        ];
        let there = sets.into_iter().filter(|(_, is_there)| *is_there);
        there.map(|(kind, _)| Self(kind)).collect()
    }

    /// The fastest variant of this machine.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Set::Portable))
    }

    /// `portable`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }

    /// [`forward::run`].
    pub(super) fn run(self, front: &mut Front, stretch: &mut Stretch<'_>) {
        match self.0 {
            Set::Portable => forward::run(front, stretch),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` makes this value only where it detected AVX2.
            Set::Avx2 => unsafe { run_avx2(front, stretch) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` makes this value only where it detected AVX-512 F, BW and VL.
            Set::Avx512 => unsafe { run_avx512(front, stretch) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2(front: &mut Front, stretch: &mut Stretch<'_>) {
    forward::run(front, stretch);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn run_avx512(front: &mut Front, stretch: &mut Stretch<'_>) {
    forward::run(front, stretch);
}
