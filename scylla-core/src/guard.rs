//! Panics of dependencies on data from outside, turned into errors.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Error, Result};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs what a dependency does with data from outside; a panic of it is an error. Where [`quiet`] was called, nothing is
/// printed then.
pub(crate) fn guarded<T>(what: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let outer = GUARDED.replace(true);
    let done = catch_unwind(AssertUnwindSafe(body));
    GUARDED.set(outer);
    done.unwrap_or_else(|payload| {
        let said = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied());
        Err(Error::Invalid(format!(
            "{what}: it cannot be worked with ({})",
            said.unwrap_or("no reason given")
        )))
    })
}

/// Keeps the program's panic hook from printing what [`guarded`] turns into errors. For programs: a library leaves the
/// hook alone.
pub fn quiet() {
    let others = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !GUARDED.get() {
            others(info);
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_message() {
        let panics = guarded("the file", || -> Result<()> { panic!("index {}", 7) });
        let error = panics.expect_err("an error").to_string();
        assert!(
            error.contains("the file") && error.contains("index 7"),
            "{error}"
        );
        assert_eq!(guarded("x", || Ok(3)).expect("passes"), 3);
    }
}
