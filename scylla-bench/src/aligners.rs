//! The aligners, made from their settings in an experiment.

use multilevel_ot::{
    Alm, CrossEntropy, Dskd, Gold, GoldSettings, MinEd, MinEdSettings, MultiLevelOt, Projection,
    Uld, XToken, XTokenSettings,
};
use scylla_core::train::Aligner;
use toml::Table;

use crate::context::{AlignerContext, parse};
use crate::registry::Registry;
use crate::{Error, Result};

/// Registers every aligner of this project.
pub(crate) fn register(registry: &mut Registry) {
    registry.aligner("multilevel-ot", |_, settings| {
        Ok(Box::new(parse::<MultiLevelOt>("aligner", settings)?))
    });
    registry.aligner("uld", |_, settings| {
        Ok(Box::new(parse::<Uld>("aligner", settings)?))
    });
    registry.aligner("ce", |_, settings| {
        Ok(Box::new(parse::<CrossEntropy>("aligner", settings)?))
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
        let (student, teacher) = context.spaces.as_ref().ok_or_else(missing)?()?;
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
