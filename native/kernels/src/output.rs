//! Where products go, cut so that several threads may write at once.

use std::marker::PhantomData;
use std::ops::Range;

use crate::Error;

/// A matrix of floats [rows, columns] in memory, `stride` floats from row to row.
pub struct Output<'a> {
    data: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    memory: PhantomData<&'a mut [f32]>,
}

// SAFETY: an `Output` stands for the exclusive borrow that made it, and shared use goes through `part`, whose callers
// promise that no two parts overlap.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

/// Some columns of some rows of an `Output`, of which there is no other part.
pub struct Part<'a> {
    data: *mut f32,
    stride: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    memory: PhantomData<&'a mut [f32]>,
}

// SAFETY: a part is the only way to its floats while it lives.
unsafe impl Send for Part<'_> {}

impl<'a> Output<'a> {
    /// An error if `memory` is too short or `stride` is below `columns`.
    pub fn new(memory: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Result<Self, Error> {
        let last = rows.saturating_sub(1).checked_mul(stride).and_then(|at| at.checked_add(columns));
        let taken = if rows == 0 { Some(0) } else { last };
        if stride < columns || taken.is_none_or(|taken| taken > memory.len()) {
            return Err(Error::new(format!(
                "an output of {rows} rows of {columns} floats, {stride} apart, does not fit {} floats",
                memory.len()
            )));
        }
        Ok(Self { data: memory.as_mut_ptr(), rows, columns, stride, memory: PhantomData })
    }

    /// Everything.
    pub fn whole(&mut self) -> Part<'_> {
        // SAFETY: `self` is borrowed exclusively as long as the part lives.
        unsafe { self.part(0..self.rows, 0..self.columns) }
    }

    /// Some columns of some rows.
    ///
    /// # Panics
    /// If a range leaves the output.
    ///
    /// # Safety
    /// No two parts that live at once may have an element in common.
    pub unsafe fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Part<'_> {
        assert!(rows.end <= self.rows && columns.end <= self.columns, "a part outside its output");
        Part { data: self.data, stride: self.stride, rows, columns, memory: PhantomData }
    }
}

impl Part<'_> {
    /// The rows, counted from the first of the output.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The columns, counted from the first of the output.
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Columns of a row, both counted from the first of the output.
    ///
    /// # Panics
    /// If they lie outside this part.
    pub fn row(&mut self, row: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(self.rows.contains(&row), "row {row} outside the part's {:?}", self.rows);
        assert!(
            columns.start <= columns.end && self.columns.start <= columns.start && columns.end <= self.columns.end,
            "columns {columns:?} outside the part's {:?}",
            self.columns
        );
        // SAFETY: the part lies within its output, whose memory was checked, and nobody else has this part.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride + columns.start), columns.len()) }
    }
}
