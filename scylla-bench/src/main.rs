//! The `scylla` command.

fn main() {
    let registry = scylla_bench::Registry::default();
    std::process::exit(scylla_bench::cli::run(&registry, std::env::args_os()));
}
