//! The aligners, made from their settings in an experiment.

use multilevel_ot::{
    Alm, Dskd, Gold, GoldSettings, MinEd, MinEdSettings, MultiLevelOt, Projection, Space, Uld,
    Vocabulary, XToken, XTokenSettings,
};
use scylla_core::text::Tokenizer;
use scylla_core::train::Aligner;
use toml::Table;

use crate::registry::{Registry, parse};
use crate::{Error, Result};

/// What an aligner may want to know when it is made.
#[derive(Default)]
pub struct AlignerContext {
    /// Tokenizers of student and teacher.
    pub tokenizers: Option<(Tokenizer, Tokenizer)>,
    /// Heads and embeddings of student and teacher.
    pub spaces: Option<(Space, Space)>,
}

impl AlignerContext {
    fn tokenizers(&self, name: &str) -> Result<(&Tokenizer, &Tokenizer)> {
        let missing = || {
            Error::Experiment(format!(
                "aligner `{name}` needs both tokenizers: --student-tokenizer and --teacher-tokenizer"
            ))
        };
        let both = self.tokenizers.as_ref().ok_or_else(missing)?;
        Ok((&both.0, &both.1))
    }

    fn vocabularies(&self, name: &str) -> Result<(Vocabulary, Vocabulary)> {
        let (student, teacher) = self.tokenizers(name)?;
        Ok((Vocabulary::of(student), Vocabulary::of(teacher)))
    }
}

/// Registers every aligner of this project.
pub(crate) fn register(registry: &mut Registry) {
    registry.aligner("multilevel-ot", |_, settings| {
        Ok(Box::new(parse::<MultiLevelOt>("aligner", settings)?))
    });
    registry.aligner("uld", |_, settings| {
        Ok(Box::new(parse::<Uld>("aligner", settings)?))
    });
    registry.aligner("alm", |_, settings| {
        Ok(Box::new(parse::<Alm>("aligner", settings)?))
    });
    registry.aligner("gold", gold);
    registry.aligner("x-token", |context, settings| {
        let settings: XTokenSettings = parse("aligner", settings)?;
        let (student, teacher) = context.tokenizers("x-token")?;
        let projection = Projection::between(student, teacher).map_err(core)?;
        Ok(Box::new(XToken::new(settings, projection).map_err(core)?))
    });
    registry.aligner("mined", |context, settings| {
        let settings: MinEdSettings = parse("aligner", settings)?;
        let (student, teacher) = context.vocabularies("mined")?;
        Ok(Box::new(
            MinEd::new(settings, student, teacher).map_err(core)?,
        ))
    });
    registry.aligner("dskd", |context, settings| {
        let settings = parse("aligner", settings)?;
        let missing =
            || Error::Experiment("aligner `dskd` needs the heads of student and teacher".into());
        let (student, teacher) = context.spaces.clone().ok_or_else(missing)?;
        Ok(Box::new(
            Dskd::new(settings, student, teacher).map_err(core)?,
        ))
    });
}

fn gold(context: &AlignerContext, settings: Table) -> Result<Box<dyn Aligner>> {
    let settings: GoldSettings = parse("aligner", settings)?;
    let vocabularies = match settings.hybrid {
        true => Some(context.vocabularies("gold")?),
        false => None,
    };
    let both = vocabularies.as_ref().map(|(s, t)| (s, t));
    Ok(Box::new(Gold::new(settings, both).map_err(core)?))
}

fn core(e: multilevel_ot::Error) -> Error {
    scylla_core::Error::from(e).into()
}
