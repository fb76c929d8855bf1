//! Forward pass as plain data: tokens of several sequences,
//! and where their keys and values are.
#![forbid(unsafe_code)]

use std::ops::Range;

/// Rows of one forward pass.
#[derive(Debug, Default, Clone)]
pub(crate) struct Pass {
    /// Token of each row, `[n]`.
    pub(crate) tokens: Vec<u32>,
    pub(crate) segments: Vec<Segment>,
    /// Block tables, `[segments, groups of layers]`.
    pub(crate) views: Vec<TableView>,
    /// Block numbers, in which [`TableView::blocks`] are ranges.
    pub(crate) tables: Vec<u32>,
    /// Blocks to copy before anything is computed.
    pub(crate) copies: Vec<BlockCopy>,
    /// Rows whose logits are wanted, ascending.
    pub(crate) wanted: Vec<usize>,
}

/// Rows of one sequence within a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Rows of the pass, consecutive; may be empty.
    pub(crate) rows: Range<usize>,
    /// Position of the first row in the sequence.
    pub(crate) first: usize,
    /// Flag: RoPE uses the frequencies for long sequences.
    pub(crate) long: bool,
}

/// Blocks of a sequence for a group of layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TableView {
    /// Position of the first entry of the first block.
    pub(crate) first: usize,
    /// Range of [`Pass::tables`].
    pub(crate) blocks: Range<usize>,
}

/// Copy of one block to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockCopy {
    pub(crate) group: usize,
    pub(crate) from: u32,
    pub(crate) to: u32,
}

impl Pass {
    /// Removes everything, but keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        self.segments.clear();
        self.views.clear();
        self.tables.clear();
        self.copies.clear();
        self.wanted.clear();
    }

    /// Returns the number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Returns the table of `segment` for a group of layers.
    pub(crate) fn view(&self, segment: usize, group: usize) -> &TableView {
        let groups = self.views.len() / self.segments.len();
        &self.views[segment * groups + group]
    }

    /// Returns the numbers of the blocks of `view`.
    pub(crate) fn blocks(&self, view: &TableView) -> &[u32] {
        &self.tables[view.blocks.clone()]
    }
}
