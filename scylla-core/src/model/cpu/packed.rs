//! Whole documents at once, without a cache: what training asks of a frozen target.

use std::sync::Arc;

use super::{Angles, CpuStack, SHARE, gated, norm, sized};
use crate::Result;
use crate::kernels::causal::{self, Packed};
use crate::kernels::{CacheForm, ProductForm, Products, Wide, rms_norm, rope};
use crate::plugin::PackedRows;

/// Rows whose feed-forward part is computed together, so that what lies between its products stays near.
const TOGETHER: usize = 512;

impl CpuStack {
    /// One layer over packed rows, of which `positions` says where in their documents they are.
    pub(super) fn packed_layer(
        &mut self,
        layer: usize,
        rows: &PackedRows,
        positions: &[u32],
        x: &mut [f32],
    ) -> Result<()> {
        let (l, b, pool) = (&self.layers[layer], &mut self.buffers, &self.pool);
        let (spec, h, m) = (&l.spec, l.spec.hidden, positions.len());
        let (ffn, eps) = (spec.ffn, spec.eps);
        let Angles { cos, sin } = &self.angles[self.angles_of[layer]];
        let (half, kv, q_len) = (spec.head_dim / 2, spec.kv_width(), spec.q_width());

        let qkv = sized(&mut b.qkv, m * l.qkv.n);
        let product = Wide::new(&l.qkv, pool);
        match &l.attention_norm {
            Some(weight) => {
                norm(pool, x, h, weight, eps, sized(&mut b.normed, m * h));
                product.multiply(pool, &b.normed, false, &mut b.scratch, qkv)?;
            }
            None => product.multiply(pool, x, false, &mut b.scratch, qkv)?,
        }
        drop(product);

        let sides = [
            sized(&mut b.q, m * q_len),
            sized(&mut b.k, m * kv),
            sized(&mut b.v, m * kv),
        ];
        let (qkv, width) = (&b.qkv, l.qkv.n);
        pool.rows(sides, [q_len, kv, kv], SHARE, |range, [q, k, v]| {
            let sides = q.chunks_exact_mut(q_len).zip(k.chunks_exact_mut(kv));
            for ((row, (q, k)), v) in range.zip(sides).zip(v.chunks_exact_mut(kv)) {
                let (queries, rest) = qkv[row * width..(row + 1) * width].split_at(q_len);
                let (key, value) = rest.split_at(kv);
                match &l.qk_norm {
                    Some([q_norm, k_norm]) => {
                        rms_norm(queries, q_norm, eps, q);
                        rms_norm(key, k_norm, eps, k);
                    }
                    None => {
                        q.copy_from_slice(queries);
                        k.copy_from_slice(key);
                    }
                }
                v.copy_from_slice(value);
                let at = positions[row] as usize * half..(positions[row] as usize + 1) * half;
                rope(q, &cos[at.clone()], &sin[at.clone()]);
                rope(k, &cos[at.clone()], &sin[at]);
            }
        });
        let products = Products {
            pool: Arc::clone(pool),
            form: match self.cache_form {
                CacheForm::F32 => ProductForm::F32,
                CacheForm::F16 => ProductForm::fastest(),
            },
        };
        let shape = Packed {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            documents: &rows.documents,
            window: spec.window,
        };
        let mixed = sized(&mut b.mixed, m * q_len);
        causal::attend(&products, &shape, &b.q, &[&b.k], &[&b.v], mixed);
        Wide::new(&l.output, pool).multiply(pool, &b.mixed, true, &mut b.scratch, x)?;

        let (gate_up, down) = (Wide::new(&l.gate_up, pool), Wide::new(&l.down, pool));
        for x in x.chunks_mut(TOGETHER * h) {
            let m = x.len() / h;
            norm(pool, x, h, &l.ffn_norm, eps, sized(&mut b.delta, m * h));
            let wide = sized(&mut b.gate_up, m * 2 * ffn);
            gate_up.multiply(pool, &b.delta, false, &mut b.scratch, wide)?;
            gated(pool, &b.gate_up, ffn, sized(&mut b.inner, m * ffn));
            down.multiply(pool, &b.inner, true, &mut b.scratch, x)?;
        }
        Ok(())
    }
}
