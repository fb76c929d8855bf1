//! Dependencies between the calls of a concurrent encoder.
#![forbid(unsafe_code)]

use std::collections::HashSet;

/// Buffers that calls have bound since the last barrier, identified by any distinct number.
#[derive(Debug, Default)]
pub(super) struct Hazards {
    read: HashSet<usize>,
    written: HashSet<usize>,
    /// Buffers that the next call reads.
    reads: Vec<usize>,
    writes: Vec<usize>,
}

impl Hazards {
    /// Records that the next call binds this buffer.
    pub fn bind(&mut self, buffer: usize, is_written: bool) {
        match is_written {
            true => self.writes.push(buffer),
            false => self.reads.push(buffer),
        }
    }

    /// Returns whether the next call, whose buffers are all bound, needs a barrier before it.
    ///
    /// It does if it reads or writes what was written, or writes what was read.
    pub fn call(&mut self) -> bool {
        let is_dependent = self
            .reads
            .iter()
            .any(|buffer| self.written.contains(buffer))
            || self
                .writes
                .iter()
                .any(|buffer| self.written.contains(buffer) || self.read.contains(buffer));
        if is_dependent {
            self.read.clear();
            self.written.clear();
        }
        self.read.extend(self.reads.drain(..));
        self.written.extend(self.writes.drain(..));
        is_dependent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns whether each call waits; a call is its read buffers and its written buffer.
    fn waits(calls: &[(&[usize], usize)]) -> Vec<bool> {
        let mut hazards = Hazards::default();
        let wait = |(reads, write): &(&[usize], usize)| {
            reads.iter().for_each(|&buffer| hazards.bind(buffer, false));
            hazards.bind(*write, true);
            hazards.call()
        };
        calls.iter().map(wait).collect()
    }

    #[test]
    fn calls_wait_for_what_they_read_and_overwrite_and_for_nothing_else() {
        // Three products of one input.
        assert_eq!(waits(&[(&[1], 2), (&[1], 3), (&[1], 4)]), [false; 3]);
        // A chain; after a barrier everything before it has finished.
        let chain = waits(&[(&[1], 2), (&[2], 3), (&[2], 4), (&[3], 5)]);
        assert_eq!(chain, [false, true, false, true]);
        // Written again, and written after it was read.
        assert_eq!(waits(&[(&[1], 2), (&[3], 2)]), [false, true]);
        assert_eq!(waits(&[(&[1], 2), (&[3], 1)]), [false, true]);
        // In place, as passes of a rotation are, and then the product.
        assert_eq!(
            waits(&[(&[1], 2), (&[2], 2), (&[2], 3)]),
            [false, true, true]
        );
    }
}
