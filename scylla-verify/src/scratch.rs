//! Rows that rules work on, kept from call to call by each thread.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

thread_local! {
    static SPARE: RefCell<Vec<Vec<f64>>> = const { RefCell::new(Vec::new()) };
}

/// A row of the vocabulary; its memory goes back to the thread's spare ones when dropped.
pub(crate) struct Row(Vec<f64>);

impl Row {
    pub(crate) fn new() -> Self {
        Self(SPARE.with_borrow_mut(Vec::pop).unwrap_or_default())
    }
}

impl Deref for Row {
    type Target = Vec<f64>;
    fn deref(&self) -> &Vec<f64> {
        &self.0
    }
}

impl DerefMut for Row {
    fn deref_mut(&mut self) -> &mut Vec<f64> {
        &mut self.0
    }
}

impl Drop for Row {
    fn drop(&mut self) {
        let row = std::mem::take(&mut self.0);
        // A thread that is ending has no spare rows any more.
        let _ = SPARE.try_with(|spare| spare.borrow_mut().push(row));
    }
}
