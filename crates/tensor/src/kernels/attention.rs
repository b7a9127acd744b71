//! Causal attention over packed `[q | k | v]` rows, with rotary positions inside and without a T x T matrix.
//!
//! `qkv` is `[B, T, (H + 2 K) E]`: H query heads, then K key heads, then K value heads of width E. A query attends to the keys from its
//! segment's first token (or the window's) to itself. Heads are packed into panels (see [`tile`]), rotated and scaled on the way, and
//! walked over in blocks of [`QUERIES`] x [`KEYS`] scores, which stay in a core's L2 cache; inside a block, tiles that no query of theirs
//! reaches are skipped. Forward keeps a running maximum and sum per query (FlashAttention-2, arXiv:2307.08691, algorithm 1) and returns
//! their logarithm; backward makes the probabilities again from it (algorithm 2), and takes rowsum(P dP) from rowsum(dO O).
//!
//! Scores are logarithms to base 2: `log2(e) / sqrt(E)` is part of the packed queries. A soft-cap bends them on their way into the softmax, and again in
//! backward.

use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

use rayon::prelude::*;

use super::matmul::Into;
use super::panel::{AHEAD, Columns, PANEL, Parts, Place, Row, pack, transpose, unpack};
use super::scratch::with_scratch;
use super::simd::{LANES, dot, exp2, fold_lanes, tanh, vectorized};
use super::tile::{Left, STRIP, tile};

pub(crate) use super::panel::Rope;

/// Queries of a block.
const QUERIES: usize = 64;

/// Keys of a block: 64 x 256 scores are 64 KiB.
const KEYS: usize = 256;

/// Shapes of one call, the reach of each query, and its rotation.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'a> {
    /// B
    pub batch: usize,
    /// T
    pub tokens: usize,
    /// H
    pub heads: usize,
    /// K; divides H.
    pub kv_heads: usize,
    /// E
    pub head_dim: usize,
    /// First token (inside its row) of each query's segment, `[B, T]`; never decreases along a row.
    pub starts: &'a [u32],
    /// How many keys a query sees at most, itself included.
    pub window: usize,
    /// Soft-cap of the scores; 0: none.
    pub softcap: f32,
    /// Cosines and sines, if positions are rotary.
    pub rope: Option<Rope<'a>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Query,
    Key,
    Value,
}

impl Shape<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Softmax's scale, `E^-1/2`.
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
    /// What packed queries are multiplied with, so that their scores are logarithms to base 2.
    fn query_factor(&self) -> f32 {
        self.scale() * LOG2_E
    }
    /// The cap of scores to base 2.
    fn cap(&self) -> f32 {
        self.softcap * LOG2_E
    }
    /// First column of head `head` of `q`, `k` or `v`.
    fn column(&self, part: Part, head: usize) -> usize {
        self.head_dim
            * match part {
                Part::Query => head,
                Part::Key => self.heads + head,
                Part::Value => self.heads + self.kv_heads + head,
            }
    }
    /// Panels of a head.
    fn panels(&self) -> usize {
        self.head_dim.div_ceil(PANEL)
    }
    /// Rows of packed matrices over all tokens.
    fn rows(&self) -> usize {
        self.tokens.next_multiple_of(PANEL)
    }
    /// Columns that panel `x` of a head uses.
    fn panel_width(&self, x: usize) -> usize {
        (self.head_dim - x * PANEL).min(PANEL)
    }
    /// First key that query `i` of batch row `b` sees.
    fn first(&self, b: usize, i: usize) -> usize {
        (self.starts[b * self.tokens + i] as usize).max((i + 1).saturating_sub(self.window))
    }

    /// The panels of `keys` that the queries `i..i + 8` see.
    fn reach(&self, b: usize, i: usize, keys: &Range<usize>) -> Range<usize> {
        let first = self.first(b, i).max(keys.start);
        let end = (i + STRIP).min(self.tokens).min(keys.end);
        if first < end { first / PANEL..end.div_ceil(PANEL) } else { 0..0 }
    }

    /// The queries of the block at `r0`.
    fn block(&self, r0: usize) -> Range<usize> {
        r0..(r0 + QUERIES).min(self.tokens)
    }

    /// One head of batch row `b` in `qkv`.
    fn head<'q>(&self, qkv: &'q [f32], b: usize, part: Part, head: usize) -> Columns<'q> {
        let stride = self.width();
        let values = &qkv[b * self.tokens * stride..];
        Columns { values, stride, first: self.column(part, head), width: self.head_dim }
    }

    /// One head of batch row `b` in a tensor of query heads alone.
    fn query_head<'q>(&self, x: &'q [f32], b: usize, head: usize) -> Columns<'q> {
        let stride = self.heads * self.head_dim;
        let values = &x[b * self.tokens * stride..];
        Columns { values, stride, first: head * self.head_dim, width: self.head_dim }
    }

    /// The rotations of batch row `b`.
    fn rope(&self, b: usize) -> Option<Rope<'_>> {
        self.rope.map(|rope| Rope { positions: &rope.positions[b * self.tokens..], ..rope })
    }

    /// `[E, 32]` per 32 of `tokens` from their panels: the right side of a product over E.
    fn transpose(&self, panels: &[Row], tokens: Range<usize>, out: &mut [Row]) {
        let e = self.head_dim;
        for p in tokens.start / PANEL..tokens.end.div_ceil(PANEL) {
            for x in 0..self.panels() {
                let from = &panels[x * self.rows() + p * PANEL..][..PANEL];
                transpose(from, &mut out[p * e + x * PANEL..][..self.panel_width(x)]);
            }
        }
    }

    /// `left right^T` of the block of queries at `r0` and the panels from `first_panel` on, where they are in a strip's reach; left panels
    /// start `far` rows apart, those of `out` [`QUERIES`].
    #[allow(clippy::too_many_arguments)]
    fn scores(
        &self,
        left: &[Row],
        far: usize,
        right: &[Row],
        r0: usize,
        reach: &[Range<usize>],
        first_panel: usize,
        out: &mut [Row],
    ) {
        let e = self.head_dim;
        let end = reach.iter().map(|r| r.end).max().unwrap_or(0);
        for p in first_panel..end {
            for (s, reach) in reach.iter().enumerate() {
                if reach.contains(&p) {
                    let out = &mut out[(p - first_panel) * QUERIES + s * STRIP..];
                    // On the diagonal, half a panel may be enough.
                    let width = r0 + (s + 1) * STRIP - p * PANEL;
                    tile(Left::Rows(&left[s * STRIP..], far), &right[p * e..], e, out, width, Into::Write);
                }
            }
        }
    }
}

/// Cuts `n` rows off the front of `rows`.
fn cut<'a>(rows: &mut &'a mut [Row], n: usize) -> &'a mut [Row] {
    let (head, tail) = std::mem::take(rows).split_at_mut(n);
    *rows = tail;
    head
}

/// Calls `work` with rows of scratch memory.
fn with_rows<R>(n: usize, work: impl FnOnce(&mut [Row]) -> R) -> R {
    with_scratch(n * PANEL, |values| work(values.as_chunks_mut().0))
}

/// Of each query of a block: the running maximum and sum of its probabilities, and what its earlier results are multiplied with.
struct Running {
    tops: [[f32; STRIP]; QUERIES / STRIP],
    sums: [[f32; STRIP]; QUERIES / STRIP],
    corrections: [[f32; STRIP]; QUERIES / STRIP],
}

/// `out [B, T, H E]` and the base-2 logarithm of softmax's denominators, `log_sums [B, H, T]`, from `qkv [B, T, (H + 2 K) E]`.
pub(crate) fn attention(qkv: &[f32], shape: Shape<'_>, out: &mut [f32], log_sums: &mut [f32]) {
    let Shape { batch, tokens: t, heads, kv_heads, head_dim: e, .. } = shape;
    if batch * t == 0 {
        return;
    }
    let (g, blocks) = (shape.group(), t.div_ceil(QUERIES));
    let (out, log_sums) = (Parts::new(out, heads * e), Parts::new(log_sums, t));
    // A task has some of the blocks of the query heads that share a key-value head: all, unless that leaves threads without work.
    let parts = (4 * rayon::current_num_threads()).div_ceil(batch * kv_heads).min(g * blocks);
    (0..batch * kv_heads * parts).into_par_iter().for_each(|task| {
        let (b, kv, part) = (task / parts / kv_heads, task / parts % kv_heads, task % parts);
        let work = part * g * blocks / parts..(part + 1) * g * blocks / parts;
        let (n, panels) = (shape.rows(), shape.panels());
        let queries = panels * QUERIES;
        with_rows(panels * n * 2 + n / PANEL * e + 2 * queries + KEYS / PANEL * QUERIES, |mut rows| {
            let (k, v) = (cut(&mut rows, panels * n), cut(&mut rows, panels * n));
            let kt = cut(&mut rows, n / PANEL * e);
            let (q, o, scores) = (cut(&mut rows, queries), cut(&mut rows, queries), rows);
            let reach = |unit: usize| {
                let block = shape.block(unit % blocks * QUERIES);
                shape.first(b, block.start) / PANEL * PANEL..block.end
            };
            let first = work.clone().map(|unit| reach(unit).start).min().unwrap_or(0);
            let keys = first..work.clone().map(|unit| reach(unit).end).max().unwrap_or(0);
            pack(shape.head(qkv, b, Part::Key, kv), keys.clone(), shape.rope(b), 1.0, k, n, keys.start);
            pack(shape.head(qkv, b, Part::Value, kv), keys.clone(), None, 1.0, v, n, keys.start);
            shape.transpose(k, keys, kt);
            for unit in work {
                let (head, block) = (kv * g + unit / blocks, shape.block(unit % blocks * QUERIES));
                let from = shape.head(qkv, b, Part::Query, head);
                pack(from, block.clone(), shape.rope(b), shape.query_factor(), q, QUERIES, 0);
                let (tops, zeros) = ([[f32::NEG_INFINITY; STRIP]; _], [[0.0; STRIP]; _]);
                let mut running = Running { tops, sums: zeros, corrections: zeros };
                forward_block(&shape, b, &block, q, kt, v, &mut running, o, scores);
                // SAFETY: each (batch row, head, block of queries) is one task's alone.
                let (mut out, mut log_sums) = unsafe {
                    let rows = b * t + block.start..b * t + block.end;
                    let log_row = b * heads + head;
                    (out.part(rows, head * e, e), log_sums.part(log_row..log_row + 1, block.start, block.len()))
                };
                let sums = running.sums.as_flattened();
                unpack(o, QUERIES, &std::array::from_fn::<_, QUERIES, _>(|i| 1.0 / sums[i]), None, &mut out);
                for ((log_sum, top), sum) in log_sums.row(0).iter_mut().zip(running.tops.as_flattened()).zip(sums) {
                    *log_sum = top + sum.log2();
                }
            }
        });
    });
}

/// Weighted values of one block of queries, `o`, not yet divided by their sums.
#[allow(clippy::too_many_arguments)]
fn forward_block(
    shape: &Shape<'_>,
    b: usize,
    block: &Range<usize>,
    q: &[Row],
    kt: &[Row],
    v: &[Row],
    running: &mut Running,
    o: &mut [Row],
    scores: &mut [Row],
) {
    let firsts = firsts(shape, b, block);
    for k0 in (firsts[0] / KEYS * KEYS..block.end).step_by(KEYS) {
        let (reach, strips) = reaches(shape, b, block, &(k0..k0 + KEYS));
        let reach = &reach[..strips];
        shape.scores(q, QUERIES, kt, block.start, reach, k0 / PANEL, scores);
        for (s, reach) in reach.iter().enumerate().filter(|(_, reach)| !reach.is_empty()) {
            let rows = s * STRIP..(s * STRIP + STRIP).min(block.len());
            let scores = &mut scores[(reach.start - k0 / PANEL) * QUERIES + rows.start..];
            let (column, row) = (reach.start * PANEL, block.start + rows.start);
            softmax(scores, reach.len(), column, row, &firsts[rows.clone()], shape.cap(), running, s);
            let into = if k0 > firsts[rows.start] { Into::Add } else { Into::Write };
            if into == Into::Add {
                correct(o, &running.corrections[s], rows.start);
            }
            let k = (row + rows.len()).min(k0 + KEYS) - column;
            for x in 0..shape.panels() {
                let right = &v[x * shape.rows() + column..];
                let o = &mut o[x * QUERIES + rows.start..];
                tile(Left::Rows(scores, QUERIES), right, k, o, shape.panel_width(x), into);
            }
        }
    }
}

/// First key of each query of a block.
fn firsts(shape: &Shape<'_>, b: usize, block: &Range<usize>) -> [usize; QUERIES] {
    std::array::from_fn(|i| shape.first(b, (block.start + i).min(block.end - 1)))
}

/// What each strip of a block sees of `keys`, and how many strips it has.
fn reaches(
    shape: &Shape<'_>,
    b: usize,
    block: &Range<usize>,
    keys: &Range<usize>,
) -> ([Range<usize>; QUERIES / STRIP], usize) {
    let mut reach = [const { 0..0 }; QUERIES / STRIP];
    for (s, i) in block.clone().step_by(STRIP).enumerate() {
        reach[s] = shape.reach(b, i, keys);
    }
    (reach, block.len().div_ceil(STRIP))
}

/// `dqkv` from `qkv`, [`attention`]'s results and the gradient of its output.
pub(crate) fn attention_backward(
    qkv: &[f32],
    out: &[f32],
    log_sums: &[f32],
    dout: &[f32],
    shape: Shape<'_>,
    dqkv: &mut [f32],
) {
    let Shape { batch, tokens: t, heads, kv_heads, head_dim: e, .. } = shape;
    if batch * t == 0 {
        return;
    }
    let g = shape.group();
    let dqkv = Parts::new(dqkv, shape.width());
    // Query heads that share a key-value head give its gradient in parts, which are added in order afterwards.
    let shared = if g > 1 { batch * heads * t * 2 * e } else { 0 };
    with_scratch(shared, |shared| {
        let shared_rows = Parts::new(shared, 2 * e);
        (0..batch * heads).into_par_iter().for_each(|task| {
            let (b, head) = (task / heads, task % heads);
            let log_sums = &log_sums[task * t..(task + 1) * t];
            // SAFETY: each (batch row, head) is one task's alone, and so is its key-value head if nobody shares it.
            let places = unsafe {
                let place = |part, head| dqkv.part(b * t..(b + 1) * t, shape.column(part, head), e);
                let shared = |at| shared_rows.part(task * t..(task + 1) * t, at, e);
                let q = place(Part::Query, head);
                if g > 1 { [q, shared(0), shared(e)] } else { [q, place(Part::Key, head), place(Part::Value, head)] }
            };
            backward_head(&shape, qkv, out, log_sums, dout, b, head, places);
        });
        let shared = &*shared;
        (0..if g > 1 { batch * t } else { 0 }).into_par_iter().with_min_len(16).for_each(|row| {
            let (b, i) = (row / t, row % t);
            for kv in 0..kv_heads {
                for (part, at) in [(Part::Key, 0), (Part::Value, e)] {
                    // SAFETY: each row is one task's alone.
                    let mut sum = unsafe { dqkv.part(row..row + 1, shape.column(part, kv), e) };
                    let sum = sum.row(0);
                    sum.fill(0.0);
                    for head in kv * g..(kv + 1) * g {
                        super::add_assign(sum, &shared[((b * heads + head) * t + i) * 2 * e + at..][..e]);
                    }
                }
            }
        });
    });
}

/// The gradients of one query head: into the places for its queries', keys' and values'.
#[allow(clippy::too_many_arguments)]
fn backward_head(
    shape: &Shape<'_>,
    qkv: &[f32],
    out: &[f32],
    log_sums: &[f32],
    dout: &[f32],
    b: usize,
    head: usize,
    [mut dq_out, mut dk_out, mut dv_out]: [Place<'_>; 3],
) {
    let Shape { tokens: t, head_dim: e, .. } = *shape;
    let kv = head / shape.group();
    let (n, panels) = (shape.rows(), shape.panels());
    let (packed, block_rows) = (panels * n, KEYS / PANEL * QUERIES);
    with_rows(7 * packed + 2 * (n / PANEL * e) + 2 * block_rows + n / PANEL, |mut rows| {
        let (q, k, d_o) = (cut(&mut rows, packed), cut(&mut rows, packed), cut(&mut rows, packed));
        // The values are needed transposed alone: packed where their gradient will be.
        let (dq, dk, dv) = (cut(&mut rows, packed), cut(&mut rows, packed), cut(&mut rows, packed));
        let (kt, vt) = (cut(&mut rows, n / PANEL * e), cut(&mut rows, n / PANEL * e));
        let (p, ds) = (cut(&mut rows, block_rows), cut(&mut rows, block_rows));
        let delta = rows.as_flattened_mut();
        pack(shape.head(qkv, b, Part::Query, head), 0..t, shape.rope(b), shape.query_factor(), q, n, 0);
        pack(shape.head(qkv, b, Part::Key, kv), 0..t, shape.rope(b), 1.0, k, n, 0);
        pack(shape.head(qkv, b, Part::Value, kv), 0..t, None, 1.0, dv, n, 0);
        shape.transpose(k, 0..t, kt);
        shape.transpose(dv, 0..t, vt);
        let (out, dout) = (shape.query_head(out, b, head), shape.query_head(dout, b, head));
        pack(dout, 0..t, None, 1.0, d_o, n, 0);
        row_dots(out, dout, &mut delta[..t]);
        for k0 in (0..t).step_by(KEYS) {
            let keys = k0..(k0 + KEYS).min(t);
            for r0 in (k0..t).step_by(QUERIES) {
                let block = shape.block(r0);
                let firsts = firsts(shape, b, &block);
                if firsts[0] >= keys.end {
                    break;
                }
                let (reach, strips) = reaches(shape, b, &block, &keys);
                let reach = &reach[..strips];
                shape.scores(&q[r0..], n, kt, r0, reach, k0 / PANEL, p);
                shape.scores(&d_o[r0..], n, vt, r0, reach, k0 / PANEL, ds);
                for (s, reach) in reach.iter().enumerate().filter(|(_, reach)| !reach.is_empty()) {
                    let rows = s * STRIP..(s * STRIP + STRIP).min(block.len());
                    let at = (reach.start - k0 / PANEL) * QUERIES + rows.start;
                    let (column, row) = (reach.start * PANEL, r0 + rows.start);
                    let (log_sums, delta) = (&log_sums[row..][..rows.len()], &delta[row..]);
                    softmax_backward(
                        &mut p[at..],
                        &mut ds[at..],
                        reach.len(),
                        column,
                        row,
                        &firsts[rows.clone()],
                        shape.cap(),
                        log_sums,
                        delta,
                    );
                    // dQ += dS K
                    let k_steps = (row + rows.len()).min(keys.end) - column;
                    let into = if k0 > firsts[rows.start] { Into::Add } else { Into::Write };
                    for x in 0..panels {
                        let (left, right) = (Left::Rows(&ds[at..], QUERIES), &k[x * n + column..]);
                        tile(left, right, k_steps, &mut dq[x * n + row..], shape.panel_width(x), into);
                    }
                }
                // dV += P^T dO and dK += dS^T Q, for the rows whose strips saw the panel.
                for panel in k0 / PANEL..keys.end.div_ceil(PANEL) {
                    let end = reach.iter().rposition(|reach| reach.contains(&panel)).map_or(0, |s| (s + 1) * STRIP);
                    let end = r0 + end.min(block.len());
                    for key in (panel * PANEL..((panel + 1) * PANEL).min(keys.end)).step_by(STRIP) {
                        let row = r0.max(key);
                        if row >= end {
                            continue;
                        }
                        let at = (panel - k0 / PANEL) * QUERIES + row - r0;
                        // A key's first query is its own.
                        let (k_steps, into) = (end - row, if key < r0 { Into::Add } else { Into::Write });
                        let (p, ds) = (Left::Columns(&p[at..], key % PANEL), Left::Columns(&ds[at..], key % PANEL));
                        for x in 0..panels {
                            let (from, to, width) = (x * n + row, x * n + key, shape.panel_width(x));
                            tile(p, &d_o[from..], k_steps, &mut dv[to..], width, into);
                            tile(ds, &q[from..], k_steps, &mut dk[to..], width, into);
                        }
                    }
                }
            }
        }
        unpack(dq, n, &[shape.scale()], shape.rope(b), &mut dq_out);
        // The queries carry log2(e) / sqrt(E), of which the logarithm's base is not part of the gradient.
        unpack(dk, n, &[LN_2], shape.rope(b), &mut dk_out);
        unpack(dv, n, &[1.0], None, &mut dv_out);
    });
}

vectorized! {
    /// Dot products of the rows of two matrices.
    fn row_dots(x: Columns<'_>, y: Columns<'_>, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            x.prefetch(i + AHEAD);
            y.prefetch(i + AHEAD);
            *out = dot(x.row(i), y.row(i));
        }
    }
}

/// Joins a row's lanes in a fixed order.
#[inline(always)]
fn fold(lanes: &Row, join: impl Fn(f32, f32) -> f32) -> f32 {
    fold_lanes(std::array::from_fn::<f32, LANES, _>(|j| join(lanes[j], lanes[j + LANES])), join)
}

/// Sets the columns of a row of a panel outside `first..end`.
#[inline(always)]
fn mask(row: &mut Row, column: usize, first: usize, end: usize, value: f32) {
    if column < first || column + PANEL > end {
        let (first, end) = (first as i32 - column as i32, end as i32 - column as i32);
        for (j, x) in row.iter_mut().enumerate() {
            *x = if j as i32 >= first && (j as i32) < end { *x } else { value };
        }
    }
}

vectorized! {
    /// Turns the scores of strip `strip` into probabilities that are not yet divided by their sum, and continues the running softmax. The strip's first panel begins at key `column`, its first row is query `row`.
    fn softmax(
        scores: &mut [Row],
        panels: usize,
        column: usize,
        row: usize,
        firsts: &[usize],
        cap: f32,
        running: &mut Running,
        strip: usize,
    ) {
        // Row by row in three steps, so that the end of one row's reduction does not hold up the next row.
        let mut tops = [f32::NEG_INFINITY; STRIP];
        for (i, (top, &first)) in tops.iter_mut().zip(firsts).enumerate() {
            let mut lanes = [f32::NEG_INFINITY; PANEL];
            for p in 0..panels {
                let scores = &mut scores[p * QUERIES + i];
                if cap > 0.0 {
                    scores.iter_mut().for_each(|score| *score = cap * tanh(*score / cap));
                }
                mask(scores, column + p * PANEL, first, row + i + 1, f32::NEG_INFINITY);
                for (lane, &score) in lanes.iter_mut().zip(&*scores) {
                    *lane = if score > *lane { score } else { *lane };
                }
            }
            *top = fold(&lanes, |a, b| if a > b { a } else { b });
        }
        let old = running.tops[strip];
        for (top, old) in tops.iter_mut().zip(old) {
            *top = if old > *top { old } else { *top };
        }
        running.tops[strip] = tops;
        // No key of this block: every score is -inf, and so is the maximum.
        let shifts = tops.map(|top| if top == f32::NEG_INFINITY { 0.0 } else { top });
        let mut corrections = old;
        for (correction, shift) in corrections.iter_mut().zip(shifts) {
            *correction = exp2(*correction - shift);
        }
        running.corrections[strip] = corrections;
        for (sum, correction) in running.sums[strip].iter_mut().zip(corrections) {
            *sum *= correction;
        }
        for i in 0..firsts.len() {
            let shift = shifts[i];
            let mut sums = [0f32; PANEL];
            for p in 0..panels {
                for (sum, score) in sums.iter_mut().zip(&mut scores[p * QUERIES + i]) {
                    *score = exp2(*score - shift);
                    *sum += *score;
                }
            }
            running.sums[strip][i] += fold(&sums, |a, b| a + b);
        }
    }
}

vectorized! {
    /// Multiplies the results of earlier blocks of keys by their corrections.
    fn correct(o: &mut [Row], corrections: &[f32], row: usize) {
        for panel in o.chunks_exact_mut(QUERIES) {
            for (o, correction) in panel[row..].iter_mut().zip(corrections) {
                for o in o {
                    *o *= correction;
                }
            }
        }
    }
}

vectorized! {
    /// `p = 2^(p - log_sum)` and `ds = p (ds - delta)` for a strip; zero outside each query's reach. With a cap, p is `cap tanh(p / cap)` first, and ds
    /// has the slope of that.
    fn softmax_backward(
        p: &mut [Row],
        ds: &mut [Row],
        panels: usize,
        column: usize,
        row: usize,
        firsts: &[usize],
        cap: f32,
        log_sums: &[f32],
        delta: &[f32],
    ) {
        for (i, ((&first, &log_sum), &delta)) in firsts.iter().zip(log_sums).zip(delta).enumerate() {
            for panel in 0..panels {
                let (p, ds) = (&mut p[panel * QUERIES + i], &mut ds[panel * QUERIES + i]);
                if cap > 0.0 {
                    for (p, ds) in p.iter_mut().zip(&mut *ds) {
                        let t = tanh(*p / cap);
                        *p = exp2(cap * t - log_sum);
                        *ds = *p * (*ds - delta) * (1.0 - t * t);
                    }
                } else {
                    for (p, ds) in p.iter_mut().zip(&mut *ds) {
                        *p = exp2(*p - log_sum);
                        *ds = *p * (*ds - delta);
                    }
                }
                mask(p, column + panel * PANEL, first, row + i + 1, 0.0);
                mask(ds, column + panel * PANEL, first, row + i + 1, 0.0);
            }
        }
    }
}
