//! A few changed files of each format, read in this process; `cargo xtask sound` reads many, in processes with limits.

#[path = "../examples/fuzz/formats.rs"]
mod formats;
#[path = "../examples/fuzz/mutate.rs"]
mod mutate;

use formats::{FORMATS, Reader};

#[test]
fn changed_files_are_taken_or_refused() {
    for format in FORMATS {
        let reader = Reader::new(format).expect("a format");
        let seeds = reader.seeds.iter().filter(|seed| reader.read(seed)).count();
        // One of GGUF's is a tokenizer without a model.
        assert!(
            seeds + 1 >= reader.seeds.len(),
            "{format}: {seeds} of {} seeds are taken",
            reader.seeds.len()
        );
        let taken = (0..400).filter(|&i| reader.read(&reader.input(i, 1)));
        let taken = taken.count();
        // Else nothing behind the first check would be reached.
        assert!(
            (1..400).contains(&taken),
            "{format}: {taken} of 400 were taken"
        );
    }
}
