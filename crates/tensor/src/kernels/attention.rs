//! Attention over packed `[q | k | v]` rows, with rotary positions inside and without a T x T matrix.
//!
//! `qkv` is `[B, T, (H + 2 K) E]`: H query heads, then K key heads, then K value heads of width E. A query sees a range of the keys:
//! those from its segment's first token (or the window's) to itself, or all of its segment. Keys and values may also be those of other tokens, `[k | v]` rows of
//! their own: then the results are a part of attention's, for the caller to join by the logarithms. Heads are packed into panels (see [`tile`]), rotated
//! and scaled on the way, and walked over in blocks of [`QUERIES`] x [`KEYS`] scores, which stay in a core's L2 cache; inside a block, tiles that no query of
//! theirs reaches are skipped. Forward keeps a running maximum and sum per query (FlashAttention-2, arXiv:2307.08691, algorithm 1) and returns
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
use super::simd::{dot, vectorized};
use super::softmax::{Running, Seen, correct, softmax, softmax_backward};
use super::tile::{Left, STRIP, tile};

pub(crate) use super::panel::Rope;

/// Queries of a block.
pub(super) const QUERIES: usize = 64;

/// Keys of a block: 64 x 256 scores are 64 KiB.
const KEYS: usize = 256;

/// One call: the inputs and their shapes, the keys that each query sees, and the rotations.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    /// `[B, T, (H + 2 K) E]`
    pub qkv: &'a [f32],
    /// Keys and values, `[B, S, 2 K E]`, where they are not those of `qkv`.
    pub kv: Option<&'a [f32]>,
    /// B
    pub batch: usize,
    /// T
    pub queries: usize,
    /// S: how many keys; T where they are those of `qkv`.
    pub keys: usize,
    /// H
    pub heads: usize,
    /// K; divides H.
    pub kv_heads: usize,
    /// E
    pub head_dim: usize,
    /// The keys that each query sees, from the first to the one behind the last, `[B, T]`: neither decreases along a row. Queries that see none are at the ends of their row.
    pub seen: &'a [[u32; 2]],
    /// Soft-cap of the scores; 0: none.
    pub softcap: f32,
    /// Cosines and sines of queries and of keys, if positions are rotary.
    pub rope: Option<[Rope<'a>; 2]>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Query,
    Key,
    Value,
}

impl Call<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
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
    /// The width of rows of keys and values: those of queries have it too, unless they are apart.
    fn kv_width(&self) -> usize {
        (if self.kv.is_some() { 0 } else { self.heads } + 2 * self.kv_heads) * self.head_dim
    }
    /// The same of the gradient of queries.
    fn dq_width(&self) -> usize {
        if self.kv.is_some() { self.heads * self.head_dim } else { self.kv_width() }
    }
    /// First column of head `head` of `q`, `k` or `v`.
    fn column(&self, part: Part, head: usize) -> usize {
        let first = if self.kv.is_some() { 0 } else { self.heads };
        self.head_dim
            * match part {
                Part::Query => head,
                Part::Key => first + head,
                Part::Value => first + self.kv_heads + head,
            }
    }
    /// Panels of a head.
    fn panels(&self) -> usize {
        self.head_dim.div_ceil(PANEL)
    }
    /// Rows of packed matrices over all keys.
    fn rows(&self) -> usize {
        self.keys.next_multiple_of(PANEL)
    }
    /// Columns that panel `x` of a head uses.
    fn panel_width(&self, x: usize) -> usize {
        (self.head_dim - x * PANEL).min(PANEL)
    }

    /// The queries of the block at `r0`.
    fn block(&self, r0: usize) -> Range<usize> {
        r0..(r0 + QUERIES).min(self.queries)
    }

    /// The keys that query `i` of batch row `b` sees.
    fn seen(&self, b: usize, i: usize) -> Seen {
        self.seen[b * self.queries + i].map(|key| key as usize)
    }

    /// Those of each query of a block; of the last one again, where the block is shorter.
    fn seen_by(&self, b: usize, block: &Range<usize>) -> [Seen; QUERIES] {
        std::array::from_fn(|i| self.seen(b, (block.start + i).min(block.end - 1)))
    }

    /// One head of batch row `b` of queries, keys or values.
    fn head(&self, b: usize, part: Part, head: usize) -> Columns<'_> {
        let (values, rows, stride) = match (self.kv, part) {
            (Some(kv), Part::Key | Part::Value) => (kv, self.keys, self.kv_width()),
            _ => (self.qkv, self.queries, (self.heads + 2 * self.kv_heads) * self.head_dim),
        };
        Columns { values: &values[b * rows * stride..], stride, first: self.column(part, head), width: self.head_dim }
    }

    /// One head of batch row `b` in a tensor of query heads alone.
    fn query_head<'q>(&self, x: &'q [f32], b: usize, head: usize) -> Columns<'q> {
        let stride = self.heads * self.head_dim;
        let values = &x[b * self.queries * stride..];
        Columns { values, stride, first: head * self.head_dim, width: self.head_dim }
    }

    /// The rotations of batch row `b` of queries or keys.
    fn rope(&self, b: usize, part: Part) -> Option<Rope<'_>> {
        let [queries, keys] = self.rope?;
        let (rope, rows) = if part == Part::Query { (queries, self.queries) } else { (keys, self.keys) };
        Some(Rope { positions: &rope.positions[b * rows..], ..rope })
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

    /// `left right^T` of a block of queries and the panels from `first_panel` on, where they are in a strip's reach; left panels
    /// start `far` rows apart, those of `out` [`QUERIES`].
    #[allow(clippy::too_many_arguments)]
    fn scores(
        &self,
        left: &[Row],
        far: usize,
        right: &[Row],
        seen: &[Seen; QUERIES],
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
                    let width = end_of(seen, s) - p * PANEL;
                    tile(Left::Rows(&left[s * STRIP..], far), &right[p * e..], e, out, width, Into::Write);
                }
            }
        }
    }
}

/// The key behind the last one that a strip of a block sees.
fn end_of(seen: &[Seen; QUERIES], strip: usize) -> usize {
    seen[strip * STRIP + STRIP - 1][1]
}

/// The panels of `keys` that each strip of a block sees, and how many strips it has.
fn reaches(
    seen: &[Seen; QUERIES],
    block: &Range<usize>,
    keys: &Range<usize>,
) -> ([Range<usize>; QUERIES / STRIP], usize) {
    let strips = block.len().div_ceil(STRIP);
    let mut reach = [const { 0..0 }; QUERIES / STRIP];
    for (s, reach) in reach[..strips].iter_mut().enumerate() {
        let (first, end) = (seen[s * STRIP][0].max(keys.start), end_of(seen, s).min(keys.end));
        if first < end {
            *reach = first / PANEL..end.div_ceil(PANEL);
        }
    }
    (reach, strips)
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

/// `out [B, T, H E]` and the base-2 logarithm of softmax's denominators, `log_sums [B, H, T]`: of a query that sees no key, zeros and -inf.
pub(crate) fn attention(call: Call<'_>, out: &mut [f32], log_sums: &mut [f32]) {
    let Call { batch, queries: t, heads, kv_heads, head_dim: e, .. } = call;
    if batch * t == 0 {
        return;
    }
    let (g, blocks) = (call.group(), t.div_ceil(QUERIES));
    let (out, log_sums) = (Parts::new(out, heads * e), Parts::new(log_sums, t));
    // A task has some of the blocks of the query heads that share a key-value head: all, unless that leaves threads without work.
    let parts = (4 * rayon::current_num_threads()).div_ceil(batch * kv_heads).min(g * blocks);
    (0..batch * kv_heads * parts).into_par_iter().for_each(|task| {
        let (b, kv, part) = (task / parts / kv_heads, task / parts % kv_heads, task % parts);
        let work = part * g * blocks / parts..(part + 1) * g * blocks / parts;
        let (n, panels) = (call.rows(), call.panels());
        let queries = panels * QUERIES;
        with_rows(panels * n * 2 + n / PANEL * e + 2 * queries + KEYS / PANEL * QUERIES, |mut rows| {
            let (k, v) = (cut(&mut rows, panels * n), cut(&mut rows, panels * n));
            let kt = cut(&mut rows, n / PANEL * e);
            let (q, o, scores) = (cut(&mut rows, queries), cut(&mut rows, queries), rows);
            let reach = |unit: usize| {
                let block = call.block(unit % blocks * QUERIES);
                call.seen(b, block.start)[0] / PANEL * PANEL..call.seen(b, block.end - 1)[1]
            };
            let first = work.clone().map(|unit| reach(unit).start).min().unwrap_or(0);
            let keys = first..work.clone().map(|unit| reach(unit).end).max().unwrap_or(0);
            pack(call.head(b, Part::Key, kv), keys.clone(), call.rope(b, Part::Key), 1.0, k, n, keys.start);
            pack(call.head(b, Part::Value, kv), keys.clone(), None, 1.0, v, n, keys.start);
            call.transpose(k, keys, kt);
            for unit in work {
                let (head, block) = (kv * g + unit / blocks, call.block(unit % blocks * QUERIES));
                let from = call.head(b, Part::Query, head);
                pack(from, block.clone(), call.rope(b, Part::Query), call.query_factor(), q, QUERIES, 0);
                let (tops, zeros) = ([[f32::NEG_INFINITY; STRIP]; _], [[0.0; STRIP]; _]);
                let mut running = Running { tops, sums: zeros, corrections: zeros };
                forward_block(&call, b, &block, q, kt, v, &mut running, o, scores);
                // SAFETY: each (batch row, head, block of queries) is one task's alone.
                let (mut out, mut log_sums) = unsafe {
                    let rows = b * t + block.start..b * t + block.end;
                    let log_row = b * heads + head;
                    (out.part(rows, head * e, e), log_sums.part(log_row..log_row + 1, block.start, block.len()))
                };
                let (sums, tops) = (running.sums.as_flattened(), running.tops.as_flattened());
                let factor = |i: usize| if tops[i] == f32::NEG_INFINITY { 0.0 } else { 1.0 / sums[i] };
                unpack(o, QUERIES, &std::array::from_fn::<_, QUERIES, _>(factor), None, &mut out);
                for ((log_sum, top), sum) in log_sums.row(0).iter_mut().zip(tops).zip(sums) {
                    *log_sum = top + sum.log2();
                }
            }
        });
    });
}

/// Weighted values of one block of queries, `o`, not yet divided by their sums.
#[allow(clippy::too_many_arguments)]
fn forward_block(
    call: &Call<'_>,
    b: usize,
    block: &Range<usize>,
    q: &[Row],
    kt: &[Row],
    v: &[Row],
    running: &mut Running,
    o: &mut [Row],
    scores: &mut [Row],
) {
    let seen = call.seen_by(b, block);
    if (0..QUERIES / STRIP).any(|s| seen[s * STRIP][0] >= end_of(&seen, s)) {
        // A strip that sees nothing.
        o.as_flattened_mut().fill(0.0);
    }
    for k0 in (seen[0][0] / KEYS * KEYS..seen[QUERIES - 1][1]).step_by(KEYS) {
        let (reach, strips) = reaches(&seen, block, &(k0..k0 + KEYS));
        let reach = &reach[..strips];
        call.scores(q, QUERIES, kt, &seen, reach, k0 / PANEL, scores);
        for (s, reach) in reach.iter().enumerate().filter(|(_, reach)| !reach.is_empty()) {
            let rows = s * STRIP..(s * STRIP + STRIP).min(block.len());
            let scores = &mut scores[(reach.start - k0 / PANEL) * QUERIES + rows.start..];
            let column = reach.start * PANEL;
            softmax(scores, reach.len(), column, &seen[rows.clone()], call.cap(), running, s);
            let into = if k0 > seen[rows.start][0] { Into::Add } else { Into::Write };
            if into == Into::Add {
                correct(o, &running.corrections[s], rows.start);
            }
            let k = end_of(&seen, s).min(k0 + KEYS) - column;
            for x in 0..call.panels() {
                let right = &v[x * call.rows() + column..];
                let o = &mut o[x * QUERIES + rows.start..];
                tile(Left::Rows(scores, QUERIES), right, k, o, call.panel_width(x), into);
            }
        }
    }
}

/// The gradients of queries, keys and values from [`attention`]'s results and the gradient of its output: `dqkv`, laid out as `qkv`; or, where keys and values
/// are apart, those of queries alone in `dqkv [B, T, H E]`, and of the others in `dkv [B, S, 2 K E]`. Where they are some of the keys that the queries see, `out` and
/// `log_sums` are those of all.
pub(crate) fn attention_backward(
    call: Call<'_>,
    out: &[f32],
    log_sums: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
    dkv: Option<&mut [f32]>,
) {
    let Call { batch, queries: t, keys: n, heads, kv_heads, head_dim: e, .. } = call;
    if batch * t == 0 {
        return;
    }
    let g = call.group();
    let dq = Parts::new(dqkv, call.dq_width());
    let apart = dkv.map(|dkv| Parts::new(dkv, call.kv_width()));
    let dkv = apart.as_ref().unwrap_or(&dq);
    // Query heads that share a key-value head give its gradient in parts, which are added in order afterwards.
    let shared = if g > 1 { batch * heads * n * 2 * e } else { 0 };
    with_scratch(shared, |shared| {
        let shared_rows = Parts::new(shared, 2 * e);
        (0..batch * heads).into_par_iter().for_each(|task| {
            let (b, head) = (task / heads, task % heads);
            let log_sums = &log_sums[task * t..(task + 1) * t];
            // SAFETY: each (batch row, head) is one task's alone, and so is its key-value head if nobody shares it.
            let places = unsafe {
                let place = |part| dkv.part(b * n..(b + 1) * n, call.column(part, head), e);
                let shared = |at| shared_rows.part(task * n..(task + 1) * n, at, e);
                let q = dq.part(b * t..(b + 1) * t, call.column(Part::Query, head), e);
                if g > 1 { [q, shared(0), shared(e)] } else { [q, place(Part::Key), place(Part::Value)] }
            };
            backward_head(&call, out, log_sums, dout, b, head, places);
        });
        let shared = &*shared;
        (0..if g > 1 { batch * n } else { 0 }).into_par_iter().with_min_len(16).for_each(|row| {
            let (b, i) = (row / n, row % n);
            for kv in 0..kv_heads {
                for (part, at) in [(Part::Key, 0), (Part::Value, e)] {
                    // SAFETY: each row is one task's alone.
                    let mut sum = unsafe { dkv.part(row..row + 1, call.column(part, kv), e) };
                    let sum = sum.row(0);
                    sum.fill(0.0);
                    for head in kv * g..(kv + 1) * g {
                        super::add_assign(sum, &shared[((b * heads + head) * n + i) * 2 * e + at..][..e]);
                    }
                }
            }
        });
    });
}

/// The gradients of one query head: into the places for its queries', keys' and values'.
fn backward_head(
    call: &Call<'_>,
    out: &[f32],
    log_sums: &[f32],
    dout: &[f32],
    b: usize,
    head: usize,
    [mut dq_out, mut dk_out, mut dv_out]: [Place<'_>; 3],
) {
    let Call { queries: t, keys: all, head_dim: e, .. } = *call;
    let kv = head / call.group();
    let (n, m, panels) = (call.rows(), t.next_multiple_of(PANEL), call.panels());
    let (of_keys, of_queries, block_rows) = (panels * n, panels * m, KEYS / PANEL * QUERIES);
    with_rows(3 * (of_keys + of_queries) + 2 * (n / PANEL * e) + 2 * block_rows + m / PANEL, |mut rows| {
        let [q, d_o, dq] = [(); 3].map(|()| cut(&mut rows, of_queries));
        // The values are needed transposed alone: packed where their gradient will be.
        let [k, dk, dv] = [(); 3].map(|()| cut(&mut rows, of_keys));
        let (kt, vt) = (cut(&mut rows, n / PANEL * e), cut(&mut rows, n / PANEL * e));
        let (p, ds) = (cut(&mut rows, block_rows), cut(&mut rows, block_rows));
        let delta = rows.as_flattened_mut();
        pack(call.head(b, Part::Query, head), 0..t, call.rope(b, Part::Query), call.query_factor(), q, m, 0);
        pack(call.head(b, Part::Key, kv), 0..all, call.rope(b, Part::Key), 1.0, k, n, 0);
        pack(call.head(b, Part::Value, kv), 0..all, None, 1.0, dv, n, 0);
        call.transpose(k, 0..all, kt);
        call.transpose(dv, 0..all, vt);
        for sum in [&mut *dq, &mut *dk, &mut *dv] {
            sum.as_flattened_mut().fill(0.0);
        }
        let (out, dout) = (call.query_head(out, b, head), call.query_head(dout, b, head));
        pack(dout, 0..t, None, 1.0, d_o, m, 0);
        row_dots(out, dout, &mut delta[..t]);
        for k0 in (0..all).step_by(KEYS) {
            let keys = k0..(k0 + KEYS).min(all);
            for r0 in (0..t).step_by(QUERIES) {
                let block = call.block(r0);
                if call.seen(b, block.end - 1)[1] <= keys.start {
                    continue;
                }
                let seen = call.seen_by(b, &block);
                if seen[0][0] >= keys.end {
                    break;
                }
                let (reach, strips) = reaches(&seen, &block, &keys);
                let reach = &reach[..strips];
                call.scores(&q[r0..], m, kt, &seen, reach, k0 / PANEL, p);
                call.scores(&d_o[r0..], m, vt, &seen, reach, k0 / PANEL, ds);
                for (s, reach) in reach.iter().enumerate().filter(|(_, reach)| !reach.is_empty()) {
                    let rows = s * STRIP..(s * STRIP + STRIP).min(block.len());
                    let at = (reach.start - k0 / PANEL) * QUERIES + rows.start;
                    let (column, row) = (reach.start * PANEL, r0 + rows.start);
                    let (log_sums, delta) = (&log_sums[row..][..rows.len()], &delta[row..]);
                    let (p, ds, seen_here) = (&mut p[at..], &mut ds[at..], &seen[rows]);
                    softmax_backward(p, ds, reach.len(), column, seen_here, call.cap(), log_sums, delta);
                    // dQ += dS K
                    let k_steps = end_of(&seen, s).min(keys.end) - column;
                    for x in 0..panels {
                        let (left, right) = (Left::Rows(ds, QUERIES), &k[x * n + column..]);
                        tile(left, right, k_steps, &mut dq[x * m + row..], call.panel_width(x), Into::Add);
                    }
                }
                // dV += P^T dO and dK += dS^T Q, for the rows whose strips saw the panel.
                for panel in k0 / PANEL..keys.end.div_ceil(PANEL) {
                    let saw = |reach: &Range<usize>| reach.contains(&panel);
                    let (Some(first), Some(last)) = (reach.iter().position(saw), reach.iter().rposition(saw)) else {
                        continue;
                    };
                    let at = (panel - k0 / PANEL) * QUERIES;
                    let (first, end) = (first * STRIP, ((last + 1) * STRIP).min(block.len()));
                    for key in (panel * PANEL..((panel + 1) * PANEL).min(keys.end)).step_by(STRIP) {
                        // The rows before it see no key from here on.
                        let row = first + seen[first..end].partition_point(|[_, end]| *end <= key);
                        if row >= end {
                            continue;
                        }
                        let (p, ds) =
                            (Left::Columns(&p[at + row..], key % PANEL), Left::Columns(&ds[at + row..], key % PANEL));
                        for x in 0..panels {
                            let (from, to, width) = (x * m + r0 + row, x * n + key, call.panel_width(x));
                            tile(p, &d_o[from..], end - row, &mut dv[to..], width, Into::Add);
                            tile(ds, &q[from..], end - row, &mut dk[to..], width, Into::Add);
                        }
                    }
                }
            }
        }
        unpack(dq, m, &[call.scale()], call.rope(b, Part::Query), &mut dq_out);
        // The queries carry log2(e) / sqrt(E), of which the logarithm's base is not part of the gradient.
        unpack(dk, n, &[LN_2], call.rope(b, Part::Key), &mut dk_out);
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
