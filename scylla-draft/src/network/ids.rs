//! The ids a draft proposes among.

use std::collections::HashMap;
use std::sync::Arc;

use scylla_core::{Error, Result};

/// Columns of a draft's logits, and the target id of each.
#[derive(Debug, Clone)]
pub struct Ids {
    /// V_d.
    pub columns: usize,
    /// Columns from here on are padding and never proposed.
    pub limit: usize,
    to_target: Option<Arc<[u32]>>,
    of_target: Arc<HashMap<u32, usize>>,
}

impl Ids {
    /// Draft ids that are target ids; those from `limit` on are padding.
    pub fn same(columns: usize, limit: usize) -> Self {
        Self {
            columns,
            limit: limit.min(columns),
            to_target: None,
            of_target: Arc::default(),
        }
    }

    /// Draft ids that stand for the listed target ids.
    ///
    /// # Errors
    /// If there is none, one lies outside the vocabulary, or one comes twice.
    pub fn mapped(to_target: Vec<u32>, vocab: usize) -> Result<Self> {
        let mut of_target = HashMap::with_capacity(to_target.len());
        for (draft, &target) in to_target.iter().enumerate() {
            if target as usize >= vocab {
                return Err(Error::Invalid(format!(
                    "draft id {draft} stands for token {target}, outside the vocabulary of {vocab}"
                )));
            }
            if let Some(earlier) = of_target.insert(target, draft) {
                return Err(Error::Invalid(format!(
                    "draft ids {earlier} and {draft} both stand for token {target}"
                )));
            }
        }
        if to_target.is_empty() {
            return Err(Error::Invalid("a draft vocabulary of no tokens".into()));
        }
        Ok(Self {
            columns: to_target.len(),
            limit: to_target.len(),
            to_target: Some(to_target.into()),
            of_target: Arc::new(of_target),
        })
    }

    /// The target id of a draft id.
    pub fn target(&self, draft: usize) -> u32 {
        match &self.to_target {
            Some(map) => map[draft],
            None => draft as u32,
        }
    }

    /// The target ids of all draft ids.
    pub fn targets(&self) -> Vec<u32> {
        (0..self.columns).map(|i| self.target(i)).collect()
    }

    /// The draft id of a target id, where it has one.
    pub fn draft(&self, target: u32) -> Option<usize> {
        match &self.to_target {
            Some(_) => self.of_target.get(&target).copied(),
            None => Some(target as usize).filter(|&id| id < self.columns),
        }
    }

    /// The map, as a tree carries it.
    pub fn map(&self) -> Option<Arc<[u32]>> {
        self.to_target.clone()
    }
}
