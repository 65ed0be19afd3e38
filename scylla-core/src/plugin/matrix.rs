//! Rows of values where a network is computed: on the host, or on a device, which they leave only when asked to.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{D, DType, Tensor};

use crate::{Error, Result};

/// Rows of values, on the host in f32, or on a device in its network's precision.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Values per row.
    pub columns: usize,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    /// Values from `first` on, `rows` of them; several matrices may share them.
    Host {
        values: Arc<Vec<f32>>,
        first: usize,
        rows: usize,
    },
    Device(Tensor),
}

impl Default for Matrix {
    fn default() -> Self {
        Self {
            columns: 0,
            data: Data::Host {
                values: Arc::default(),
                first: 0,
                rows: 0,
            },
        }
    }
}

/// The most probable columns of each row.
#[derive(Debug, Clone, PartialEq)]
pub struct TopRows {
    /// How many of each.
    pub k: usize,
    /// Columns and log-probabilities, row by row, best first; ties go to the lowest column.
    pub entries: Vec<(usize, f64)>,
}

impl TopRows {
    /// The best of one row.
    pub fn row(&self, row: usize) -> &[(usize, f64)] {
        &self.entries[row * self.k..(row + 1) * self.k]
    }
}

/// Columns that candle sorts at once: of the powers of two that its kernel takes, the one that is fast.
const SORTED: usize = 1024;

impl Matrix {
    /// Rows on the host, one after the other.
    ///
    /// # Panics
    /// If the values are no whole rows of `columns`.
    pub fn host(data: Vec<f32>, columns: usize) -> Self {
        let rows = data.len().checked_div(columns).unwrap_or(0);
        let mut parts = Self::parts(data, columns, &[rows]);
        parts.swap_remove(0)
    }

    /// Matrices of so many rows each, one after the other in the same memory.
    ///
    /// # Panics
    /// If the values are not that many rows of `columns`.
    pub fn parts(data: Vec<f32>, columns: usize, counts: &[usize]) -> Vec<Self> {
        let total: usize = counts.iter().sum();
        assert!(
            columns > 0 && data.len() == total * columns,
            "{} values are not {total} rows of {columns}",
            data.len()
        );
        let whole = Self {
            columns,
            data: Data::Host {
                values: Arc::new(data),
                first: 0,
                rows: total,
            },
        };
        whole.split(counts).unwrap_or_default()
    }

    /// Rows of a two-dimensional tensor of floating-point values.
    pub fn device(tensor: Tensor) -> Result<Self> {
        let (_, columns) = tensor.dims2()?;
        Ok(Self {
            columns,
            data: Data::Device(tensor),
        })
    }

    /// The matrices that so many rows each make, one after the other; they share its memory.
    ///
    /// # Errors
    /// If there are fewer rows.
    pub fn split(&self, counts: &[usize]) -> Result<Vec<Self>> {
        let mut next = 0;
        let part = |&count: &usize| {
            let begin = next;
            next += count;
            if next > self.rows() {
                return Err(Error::Invalid(format!("row {next} of {}", self.rows())));
            }
            let data = match &self.data {
                Data::Host { values, first, .. } => Data::Host {
                    values: Arc::clone(values),
                    first: first + begin * self.columns,
                    rows: count,
                },
                Data::Device(t) => Data::Device(t.narrow(0, begin, count)?),
            };
            Ok(Self {
                columns: self.columns,
                data,
            })
        };
        counts.iter().map(part).collect()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        match &self.data {
            Data::Host { rows, .. } => *rows,
            Data::Device(t) => t.dim(0).unwrap_or(0),
        }
    }

    /// Whether the values are on a device.
    pub fn is_on_device(&self) -> bool {
        matches!(self.data, Data::Device(_))
    }

    /// All rows on the host.
    ///
    /// # Errors
    /// If they are on a device.
    pub fn values(&self) -> Result<&[f32]> {
        match &self.data {
            Data::Host {
                values,
                first,
                rows,
            } => Ok(&values[*first..first + rows * self.columns]),
            Data::Device(_) => Err(Error::Invalid(
                "values on a device where the host's are wanted".into(),
            )),
        }
    }

    /// The tensor `[rows, columns]` on a device.
    ///
    /// # Errors
    /// If the values are on the host.
    pub fn tensor(&self) -> Result<&Tensor> {
        match &self.data {
            Data::Device(t) => Ok(t),
            Data::Host { .. } => Err(Error::Invalid(
                "values on the host where a device's are wanted".into(),
            )),
        }
    }

    /// The same values, which a later change of this matrix does not reach: a copy on the host, shared on a device, where
    /// values do not change.
    pub fn snapshot(&self) -> Self {
        match self.values() {
            Ok(values) if self.columns > 0 => Self::host(values.to_vec(), self.columns),
            _ => self.clone(),
        }
    }

    /// Makes it a matrix of this size on the host, in the memory it has where nobody shares it; what stands there may be
    /// anything.
    pub fn sized(&mut self, rows: usize, columns: usize) -> &mut [f32] {
        let memory = std::mem::take(self).into_memory().unwrap_or_default();
        self.columns = columns;
        self.data = Data::Host {
            values: Arc::new(memory),
            first: 0,
            rows,
        };
        match &mut self.data {
            Data::Host { values, .. } => {
                let values = Arc::make_mut(values);
                values.resize(rows * columns, 0.0);
                values
            }
            Data::Device(_) => &mut [],
        }
    }

    /// The rows on the host, to be changed; memory that others share is copied first.
    ///
    /// # Errors
    /// If they are on a device.
    pub fn values_mut(&mut self) -> Result<&mut [f32]> {
        let columns = self.columns;
        match &mut self.data {
            Data::Host {
                values,
                first,
                rows,
            } => {
                let range = *first..*first + *rows * columns;
                Ok(&mut Arc::make_mut(values)[range])
            }
            Data::Device(_) => Err(Error::Invalid(
                "values on a device where the host's are wanted".into(),
            )),
        }
    }

    /// Forgets all rows; memory is kept.
    pub fn clear(&mut self) {
        if !self.is_on_device() {
            self.sized(0, 0);
        } else {
            *self = Self::default();
        }
    }

    /// Becomes a copy of another matrix, in the memory it has where both are on the host.
    pub fn copy_of(&mut self, other: &Self) {
        match other.values() {
            Ok(values) => self
                .sized(other.rows(), other.columns)
                .copy_from_slice(values),
            Err(_) => self.clone_from(other),
        }
    }

    /// Matrices of so many equal shares of each row.
    ///
    /// # Errors
    /// If the columns are no whole number of shares.
    pub fn columns_split(&self, shares: usize) -> Result<Vec<Self>> {
        if shares == 0 || !self.columns.is_multiple_of(shares) {
            return Err(Error::Invalid(format!(
                "{} columns in {shares} shares",
                self.columns
            )));
        }
        let each = self.columns / shares;
        let share = |i: usize| match &self.data {
            Data::Device(t) => Self::device(t.narrow(1, i * each, each)?),
            Data::Host { .. } => {
                let rows = self.values()?.chunks_exact(self.columns);
                let share = rows.flat_map(|row| &row[i * each..(i + 1) * each]);
                Ok(Self::host(share.copied().collect(), each))
            }
        };
        (0..shares).map(share).collect()
    }

    /// Keeps the first `n` rows, or all where there are fewer.
    pub fn keep_first(&mut self, n: usize) -> Result<()> {
        match &mut self.data {
            Data::Host { rows, .. } => *rows = n.min(*rows),
            Data::Device(t) => *t = t.narrow(0, 0, n.min(t.dim(0)?))?,
        }
        Ok(())
    }

    /// Forgets the first `n` rows, or all where there are fewer.
    pub fn drop_first(&mut self, n: usize) -> Result<()> {
        let (n, columns) = (n.min(self.rows()), self.columns);
        match &mut self.data {
            Data::Host {
                values,
                first,
                rows,
            } => {
                *rows -= n;
                match Arc::get_mut(values) {
                    Some(values) => {
                        values.drain(..*first + n * columns);
                        *first = 0;
                    }
                    None => *first += n * columns,
                }
            }
            Data::Device(t) => *t = t.narrow(0, n, t.dim(0)? - n)?,
        }
        Ok(())
    }

    /// Matrices one below the other; neighbours in one memory stay there.
    ///
    /// # Errors
    /// If their widths differ, or some are on a device.
    pub fn joined(mut parts: Vec<Self>) -> Result<Self> {
        if parts.len() <= 1 {
            return Ok(parts.pop().unwrap_or_default());
        }
        let columns = parts[0].columns;
        if let Some(other) = parts.iter().find(|p| p.columns != columns) {
            return Err(Error::Invalid(format!(
                "rows of {} values below rows of {columns}",
                other.columns
            )));
        }
        if parts.iter().any(Self::is_on_device) {
            let all = parts.iter().map(|p| p.tensor().cloned());
            return Self::device(cat(&all.collect::<Result<Vec<_>>>()?, 0)?);
        }
        let total = parts.iter().map(Self::rows).sum();
        let follows = |w: &[Self]| match (&w[0].data, &w[1].data) {
            (
                Data::Host {
                    values,
                    first,
                    rows,
                },
                Data::Host {
                    values: next,
                    first: then,
                    ..
                },
            ) => Arc::ptr_eq(values, next) && first + rows * columns == *then,
            _ => false,
        };
        if parts.windows(2).all(follows)
            && let Data::Host { values, first, .. } = &parts[0].data
        {
            let (values, first) = (Arc::clone(values), *first);
            let rows = total;
            return Ok(Self {
                columns,
                data: Data::Host {
                    values,
                    first,
                    rows,
                },
            });
        }
        let mut all = Vec::with_capacity(total * columns);
        for part in &parts {
            all.extend_from_slice(part.values()?);
        }
        Ok(Self::host(all, columns))
    }

    /// Appends rows, each of which is the listed row of all `parts` side by side. A matrix without rows becomes one of
    /// their width, where they are.
    ///
    /// # Errors
    /// If a row lies beyond a part, or the widths do not fit.
    pub fn append(&mut self, parts: &[&Self], rows: &[usize]) -> Result<()> {
        let width: usize = parts.iter().map(|p| p.columns).sum();
        for part in parts {
            if let Some(row) = rows.iter().find(|&&row| row >= part.rows()) {
                return Err(Error::Invalid(format!("row {row} of {}", part.rows())));
            }
        }
        if self.rows() == 0 {
            self.columns = width;
        }
        if rows.is_empty() {
            return Ok(());
        }
        if width != self.columns {
            return Err(Error::Invalid(format!(
                "rows of {width} values behind rows of {}",
                self.columns
            )));
        }
        if parts.iter().any(|p| p.is_on_device()) {
            return self.append_on_device(parts, rows);
        }
        let values = parts
            .iter()
            .map(|p| p.values())
            .collect::<Result<Vec<_>>>()?;
        let to = self.tail()?;
        for &row in rows {
            for (part, values) in parts.iter().zip(&values) {
                to.extend_from_slice(&values[row * part.columns..(row + 1) * part.columns]);
            }
        }
        if let Data::Host { rows: count, .. } = &mut self.data {
            *count += rows.len();
        }
        Ok(())
    }

    /// The memory of a matrix on the host, ending with its last row.
    fn tail(&mut self) -> Result<&mut Vec<f32>> {
        let columns = self.columns;
        let Data::Host {
            values,
            first,
            rows,
        } = &mut self.data
        else {
            return Err(Error::Invalid("rows of the host behind a device's".into()));
        };
        let range = *first..*first + *rows * columns;
        if Arc::get_mut(values).is_none() {
            *values = Arc::new(values[range].to_vec());
            *first = 0;
        }
        let values = Arc::make_mut(values);
        values.truncate(*first + *rows * columns);
        Ok(values)
    }

    fn append_on_device(&mut self, parts: &[&Self], rows: &[usize]) -> Result<()> {
        let run = rows.windows(2).all(|w| w[1] == w[0] + 1);
        let chosen = |part: &&Self| -> Result<Tensor> {
            let t = part.tensor()?;
            if run {
                return Ok(t.narrow(0, rows[0], rows.len())?);
            }
            let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
            Ok(t.index_select(&Tensor::new(ids, t.device())?, 0)?)
        };
        let chosen = parts.iter().map(chosen).collect::<Result<Vec<_>>>()?;
        let beside = cat(&chosen, 1)?;
        let all = match self.rows() {
            0 => beside,
            _ => cat(&[self.tensor()?.clone(), beside], 0)?,
        };
        self.data = Data::Device(all);
        Ok(())
    }

    /// One row; only this row leaves a device.
    pub fn row(&self, row: usize) -> Result<Cow<'_, [f32]>> {
        if row >= self.rows() {
            return Err(Error::Invalid(format!("row {row} of {}", self.rows())));
        }
        Ok(match &self.data {
            Data::Host { values, first, .. } => {
                let at = first + row * self.columns;
                Cow::Borrowed(&values[at..at + self.columns])
            }
            Data::Device(t) => Cow::Owned(to_host(&t.get(row)?)?),
        })
    }

    /// All rows, row-major.
    pub fn all(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match &self.data {
            Data::Host { .. } => Cow::Borrowed(self.values()?),
            Data::Device(t) => Cow::Owned(to_host(t)?),
        })
    }

    /// The column of the largest value among the first `limit` of each row asked for; ties go to the lowest.
    ///
    /// # Errors
    /// If a row holds NaN, or its largest value is not finite.
    pub fn argmax(&self, rows: &[usize], limit: usize) -> Result<Vec<u32>> {
        let limit = limit.min(self.columns);
        if self.is_on_device() && !rows.is_empty() {
            return self.argmax_on_device(rows, limit);
        }
        rows.iter()
            .map(|&row| crate::sampling::argmax(&self.row(row)?[..limit]))
            .collect()
    }

    /// Two numbers a row leave the device. A device's own argmax gives any of several equal values.
    fn argmax_on_device(&self, rows: &[usize], limit: usize) -> Result<Vec<u32>> {
        let mut chosen = Self::default();
        chosen.append(&[self], rows)?;
        let values = chosen.tensor()?.narrow(1, 0, limit)?.to_dtype(DType::F32)?;
        // NaN is not equal to itself, nor to any maximum, and so never the largest below; it is counted.
        let broken = values.ne(&values)?.to_dtype(DType::F32)?.max(D::Minus1)?;
        let largest = values.max_keepdim(D::Minus1)?;
        let ids = Tensor::arange(0u32, limit as u32, values.device())?.to_dtype(DType::F32)?;
        let beyond = Tensor::full(limit as f32, values.shape(), values.device())?;
        let ids = values
            .broadcast_eq(&largest)?
            .where_cond(&ids.broadcast_as(values.shape())?, &beyond)?
            .min(D::Minus1)?;
        let found = Tensor::stack(&[&ids, &largest.squeeze(1)?, &broken], 1)?.to_vec2::<f32>()?;
        let id = |found: &Vec<f32>| match found[..] {
            [id, largest, 0.0] if largest.is_finite() => Ok(id as u32),
            [_, largest, broken] => Err(Error::Invalid(format!(
                "logits whose largest value is {}",
                if broken == 0.0 { largest } else { f32::NAN }
            ))),
            _ => Err(Error::Invalid("a row of no logits".into())),
        };
        found.iter().map(id).collect()
    }

    /// The `k` largest of the first `limit` columns of every row, as log-probabilities among those columns.
    ///
    /// On a device by sorting runs of columns, then the best of all runs: candle has no top-k there, and its sort takes
    /// some thousand columns at most. Of equal values at the end of a run any may be dropped; those that are kept are in
    /// order of their columns.
    ///
    /// # Errors
    /// If a row holds NaN, or its largest value is not finite.
    pub fn top_log_probabilities(&self, limit: usize, k: usize) -> Result<TopRows> {
        let limit = limit.min(self.columns);
        let k = k.min(limit);
        let mut top = TopRows {
            k,
            entries: Vec::with_capacity(self.rows() * k),
        };
        if k == 0 || self.rows() == 0 {
            return Ok(top);
        }
        if !self.is_on_device() {
            for row in 0..self.rows() {
                let row = &self.row(row)?[..limit];
                top.entries
                    .extend(crate::sampling::top_log_probabilities(row, limit, k)?);
            }
            return Ok(top);
        }
        let values = self.tensor()?.narrow(1, 0, limit)?.to_dtype(DType::F32)?;
        let total = values.log_sum_exp(D::Minus1)?.unsqueeze(1)?;
        // The host's sort wants an order, which NaN has none in; a GPU's does not care, and is not waited for.
        if values.device().is_cpu() {
            total
                .flatten_all()?
                .to_vec1()?
                .into_iter()
                .try_for_each(check_total)?;
        }
        let (values, ids) = top_k(&values.contiguous()?, k)?;
        let ids = ids.to_dtype(DType::F32)?;
        let found = Tensor::cat(&[&total, &values, &ids], 1)?.to_vec2::<f32>()?;
        for row in &found {
            check_total(row[0])?;
            let total = f64::from(row[0]);
            let entry = |(&v, &id): (&f32, &f32)| (id as usize, f64::from(v) - total);
            let first = top.entries.len();
            let pairs = row[1..=k].iter().zip(&row[1 + k..]);
            top.entries.extend(pairs.map(entry));
            if top.entries[first..].iter().any(|(id, _)| *id >= limit) {
                // Fewer than k values are finite, and a run was filled up.
                let row = self.row(first / k)?;
                let best = crate::sampling::top_log_probabilities(&row, limit, k)?;
                top.entries.splice(first.., best);
            }
            top.entries[first..].sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        }
        Ok(top)
    }

    /// The values of a matrix on the host: its memory where no other matrix shares it, else a copy.
    ///
    /// # Errors
    /// If it is on a device.
    pub fn into_values(self) -> Result<Vec<f32>> {
        let columns = self.columns;
        match self.data {
            Data::Host {
                values,
                first,
                rows,
            } => {
                let range = first..first + rows * columns;
                match Arc::try_unwrap(values) {
                    Ok(mut values) if first == 0 => {
                        values.truncate(range.end);
                        Ok(values)
                    }
                    Ok(values) => Ok(values[range].to_vec()),
                    Err(shared) => Ok(shared[range].to_vec()),
                }
            }
            Data::Device(_) => Err(Error::Invalid("values of a device are asked for".into())),
        }
    }

    /// The memory behind the matrix, where it is on the host and no other matrix shares it any more: what it holds may
    /// be more than these rows, and is done with.
    pub fn into_memory(self) -> Option<Vec<f32>> {
        match self.data {
            Data::Host { values, .. } => Arc::try_unwrap(values).ok(),
            Data::Device(_) => None,
        }
    }
}

/// Tensors one after the other; where their precisions differ, in single precision.
fn cat(parts: &[Tensor], dim: usize) -> Result<Tensor> {
    if let [one] = parts {
        return Ok(one.clone());
    }
    if parts.windows(2).all(|w| w[0].dtype() == w[1].dtype()) {
        return Ok(Tensor::cat(parts, dim)?);
    }
    let wide = parts.iter().map(|t| t.to_dtype(DType::F32));
    Ok(Tensor::cat(
        &wide.collect::<candle_core::Result<Vec<_>>>()?,
        dim,
    )?)
}

/// The logarithm of a row's sum of exponentials is finite unless a logit is broken, or all have no mass.
fn check_total(total: f32) -> Result<()> {
    match total.is_finite() {
        true => Ok(()),
        false => Err(Error::Invalid(format!(
            "logits whose sum of exponentials is {total}"
        ))),
    }
}

fn to_host(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// The `k` largest of each row `[M, N]` with their columns (u32), best first.
fn top_k(values: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let (m, n) = values.dims2()?;
    let chunk = SORTED.max(k.next_power_of_two() * 2);
    if n <= chunk {
        let order = values.arg_sort_last_dim(false)?.narrow(1, 0, k)?;
        let order = order.contiguous()?;
        return Ok((values.gather(&order, 1)?, order));
    }
    let runs = n.div_ceil(chunk);
    let padded = match runs * chunk - n {
        0 => values.clone(),
        more => {
            let filler = Tensor::full(f32::NEG_INFINITY, (m, more), values.device())?;
            Tensor::cat(&[values, &filler], 1)?
        }
    };
    let (best, within) = top_k(&padded.reshape((m * runs, chunk))?, k)?;
    let firsts = Tensor::arange_step(0u32, (runs * chunk) as u32, chunk as u32, values.device())?;
    let columns = within
        .reshape((m, runs, k))?
        .broadcast_add(&firsts.reshape((1, runs, 1))?)?
        .reshape((m, runs * k))?;
    let (best, at) = top_k(&best.reshape((m, runs * k))?, k)?;
    Ok((best, columns.gather(&at, 1)?))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    fn device(values: &[f32], columns: usize) -> Matrix {
        let rows = values.len() / columns;
        let tensor = Tensor::from_slice(values, (rows, columns), &Device::Cpu);
        Matrix::device(tensor.expect("tensor")).expect("matrix")
    }

    /// Rows of values that are all different, so that there is one order.
    fn distinct(rows: usize, columns: usize, seed: u64) -> Vec<f32> {
        let value = |i: u64| {
            let mixed = (i + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
            (mixed as f32 / (1u64 << 24) as f32) * 20.0 - 10.0 + i as f32 * 1e-6
        };
        (0..(rows * columns) as u64).map(value).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 40 }))]
        /// On candle's tensors as on the host, for rows shorter and longer than what is sorted at once.
        #[test]
        #[cfg_attr(miri, ignore = "too large to interpret")]
        fn the_best_of_a_device_are_those_of_the_host(
            rows in 1usize..4,
            columns in prop::sample::select(vec![1usize, 7, 1023, 1024, 1025, 5000, 49152]),
            k in 1usize..16, seed in 0u64..1000, padding in 0usize..300,
        ) {
            let values = distinct(rows, columns, seed);
            let limit = columns.saturating_sub(padding).max(1);
            let (host, device) = (Matrix::host(values.clone(), columns), device(&values, columns));
            let expected = host.top_log_probabilities(limit, k).expect("host");
            let found = device.top_log_probabilities(limit, k).expect("device");
            prop_assert_eq!(found.k, expected.k);
            for (found, expected) in found.entries.iter().zip(&expected.entries) {
                prop_assert_eq!(found.0, expected.0);
                prop_assert!((found.1 - expected.1).abs() < 1e-5, "{} {}", found.1, expected.1);
            }
            let all: Vec<usize> = (0..rows).collect();
            prop_assert_eq!(device.argmax(&all, limit).expect("device"), host.argmax(&all, limit).expect("host"));
        }

        /// Rows that are appended, dropped and split are the same rows wherever they are.
        #[test]
        fn rows_move_on_a_device_as_on_the_host(
            steps in prop::collection::vec((0usize..4, 0usize..6, 1usize..4), 1..12),
        ) {
            let source = distinct(6, 5, 3);
            let (host, device) = (Matrix::host(source.clone(), 5), device(&source, 5));
            let (mut a, mut b) = (Matrix::default(), Matrix::default());
            for (what, at, count) in steps {
                let rows: Vec<usize> = (0..count).map(|i| (at + i * at) % 6).collect();
                match what {
                    0 => {
                        a.drop_first(at).expect("host");
                        b.drop_first(at).expect("device");
                    }
                    1 if a.rows() > 0 => {
                        a.keep_first(at).expect("host");
                        b.keep_first(at).expect("device");
                    }
                    _ => {
                        a.append(&[&host, &host], &rows).expect("host");
                        b.append(&[&device, &device], &rows).expect("device");
                    }
                }
                prop_assert_eq!(a.rows(), b.rows());
                prop_assert_eq!(a.all().expect("host"), b.all().expect("device"));
            }
        }
    }

    #[test]
    fn equal_and_broken_values_are_told_alike() {
        let rows = [1.0, 3.0, 3.0, f32::NAN, 1.0, 2.0, 0.0, f32::INFINITY, 5.0];
        let m = device(&rows, 3);
        assert_eq!(m.argmax(&[0], 3).expect("the lower"), [1]);
        assert!(m.argmax(&[0, 1], 3).is_err() && m.argmax(&[2], 3).is_err());
        assert!(m.top_log_probabilities(3, 2).is_err());
        let mut long = distinct(1, 5000, 1);
        (0..5000).step_by(7).for_each(|i| long[i] = f32::NAN);
        assert!(device(&long, 5000).top_log_probabilities(5000, 3).is_err());
        let none = [f32::NEG_INFINITY; 3];
        assert!(device(&none, 3).argmax(&[0], 3).is_err());
        let few = [f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY];
        let top = device(&few, 3).top_log_probabilities(3, 2).expect("one");
        assert_eq!(top.row(0)[0], (1, 0.0));
    }

    #[test]
    fn memory_that_others_hold_is_not_written() {
        let whole = Matrix::host((0..12).map(|i| i as f32).collect(), 3);
        let mut parts = whole.split(&[1, 3]).expect("parts");
        let kept = parts[1].clone();
        parts[1].append(&[&whole], &[0]).expect("append");
        parts[0].values_mut().expect("host").fill(9.0);
        parts[1].drop_first(1).expect("drop");
        assert_eq!(whole.row(0).expect("row")[..], [0.0, 1.0, 2.0]);
        assert_eq!(kept.all().expect("rows")[..3], [3.0, 4.0, 5.0]);
        assert_eq!(parts[1].all().expect("rows")[6..], [0.0, 1.0, 2.0]);
    }
}
