//! The first 10,000 primes, 2 to 104,729, computed at compile time.
#![forbid(unsafe_code)]

/// Number of primes in the table.
pub const PRIME_COUNT: usize = 10_000;

/// The largest prime of the table, the 10,000th.
pub const LARGEST_PRIME: u32 = 104_729;

/// The first 10,000 primes in ascending order: `PRIME_LUT[0] == 2`, `PRIME_LUT[9_999] == 104_729`.
///
/// Every weight of a UPG file is `scale * PRIME_LUT[index] * value` (40 kB, built by a sieve of
/// Eratosthenes in a constant expression; no start-up cost).
pub static PRIME_LUT: [u32; PRIME_COUNT] = sieve();

/// An index into [`PRIME_LUT`] that is known to be in range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrimeIndex(u16);

impl PrimeIndex {
    /// `Some` if `index < 10_000`.
    pub const fn new(index: u16) -> Option<Self> {
        if (index as usize) < PRIME_COUNT {
            Some(Self(index))
        } else {
            None
        }
    }

    /// The index itself.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The prime it selects.
    pub fn prime(self) -> u32 {
        PRIME_LUT[self.0 as usize]
    }
}

const fn sieve() -> [u32; PRIME_COUNT] {
    const LIMIT: usize = LARGEST_PRIME as usize + 1;
    let mut composite = [false; LIMIT];
    let mut primes = [0u32; PRIME_COUNT];
    let (mut count, mut n) = (0, 2);
    while n < LIMIT {
        if !composite[n] {
            primes[count] = n as u32;
            count += 1;
            let mut multiple = n * n;
            while multiple < LIMIT {
                composite[multiple] = true;
                multiple += n;
            }
        }
        n += 1;
    }
    assert!(count == PRIME_COUNT, "LARGEST_PRIME is the 10,000th prime");
    primes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_prime_lut() {
        let independent: Vec<u32> = primal::Primes::all()
            .take(PRIME_COUNT)
            .map(|p| p as u32)
            .collect();
        assert_eq!(PRIME_LUT.as_slice(), independent);
        assert_eq!(PRIME_LUT[PRIME_COUNT - 1], LARGEST_PRIME);
    }

    #[test]
    fn an_index_past_the_table_is_refused() {
        assert_eq!(
            PrimeIndex::new(9_999).map(PrimeIndex::prime),
            Some(LARGEST_PRIME)
        );
        assert_eq!(PrimeIndex::new(10_000), None);
    }
}
