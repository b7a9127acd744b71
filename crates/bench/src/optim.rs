//! `bench optim`: a step of each optimizer, beside `torch.optim`, and beside a copy of memory.

use burn::tensor::Device;
use firebox_optim::{Algorithm, ParamKind, ParamState};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::Precision;

use crate::contender::Contender;
use crate::error::Result;
use crate::kernels::{Kernel, Report, Row, Work};
use crate::stats::{Spread, number, percent, times};
use crate::table::Table;

/// Width and number of the matrices that are updated: 16.8M parameters, more than any cache holds.
const MATRICES: (usize, usize) = (16, 1024);

/// The cases: a copy, and every optimizer.
pub fn cases() -> Vec<Kernel> {
    let (count, d) = MATRICES;
    let step =
        |algorithm: Algorithm, bits| Kernel::Optimizer { algorithm: algorithm.name().to_owned(), bits, count, d };
    let mut cases = vec![Kernel::Copy { n: count * d * d }];
    cases.extend(Algorithm::all().into_iter().map(|algorithm| step(algorithm, 32)));
    cases.extend([16, 8].map(|bits| step(Algorithm::default(), bits)));
    cases
}

/// The algorithm of that name, with its defaults.
pub fn named(name: &str) -> Option<Algorithm> {
    Algorithm::all().into_iter().find(|algorithm| algorithm.name() == name)
}

/// The state of a matrix, in 32, 16 or 8 bits.
pub fn state(algorithm: &Algorithm, bits: u32, d: usize, device: &Device) -> ParamState {
    let precision = match bits {
        8 => Precision::Int8,
        16 => Precision::Bf16,
        _ => Precision::Full,
    };
    ParamState::with_precision(algorithm, ParamKind::Matrix, &[d, d], precision, "", device)
}

/// Its bytes.
///
/// # Errors
/// A backend that this build lacks.
pub fn state_bytes(algorithm: &Algorithm, bits: u32, d: usize) -> Result<usize> {
    Ok(state(algorithm, bits, d, &Backend::NdArray.device()?).bytes())
}

/// Whether PyTorch has this optimizer, in this form.
pub fn torch_has(algorithm: &str, contender: Contender) -> bool {
    match contender {
        // Fused where there is a fused form on a CPU; one tensor after the other for Muon.
        Contender::TorchEager => ["adamw", "adam", "sgd", "muon"].contains(&algorithm),
        Contender::TorchForeach => ["adamw", "adam", "sgd", "adafactor"].contains(&algorithm),
        _ => false,
    }
}

/// The table, in Markdown.
///
/// # Errors
/// A backend that this build lacks.
pub fn markdown(report: &Report) -> Result<String> {
    let median = |row: &Row, contender: Contender| {
        let column = report.contenders.iter().position(|&other| other == contender)?;
        let seconds = row.seconds.get(column).filter(|seconds| !seconds.is_empty())?;
        Some(Spread::of(seconds.iter().copied()).median)
    };
    // The faster of the two copies is the machine's bandwidth.
    let rate = |row: &Row, contender| {
        let (Work::Bytes(work) | Work::Flops(work)) = row.work;
        Some(work / median(row, contender)?)
    };
    let copies = report.rows.iter().filter(|row| matches!(row.kernel, Kernel::Copy { .. }));
    let copy = copies
        .flat_map(|row| report.contenders.iter().filter_map(move |&contender| rate(row, contender)))
        .fold(0.0, f64::max);
    let mut table = Table::new(
        [
            "optimizer",
            "state, bytes per parameter",
            "firebox, ms",
            "torch fused, ms",
            "torch foreach, ms",
            "to the best of torch",
            "GB/s",
            "of a copy's",
        ]
        .map(str::to_owned),
    );
    for row in &report.rows {
        let Kernel::Optimizer { algorithm, bits, d, .. } = &row.kernel else { continue };
        let cell = |seconds: Option<f64>| seconds.map_or_else(String::new, |seconds| number(1e3 * seconds));
        let torch = [Contender::TorchEager, Contender::TorchForeach].map(|contender| median(row, contender));
        let ours = median(row, Contender::Firebox);
        let ratio = torch.iter().flatten().copied().min_by(f64::total_cmp).zip(ours).map(|(torch, ours)| torch / ours);
        let bytes = match named(algorithm) {
            Some(algorithm) => state_bytes(&algorithm, *bits, *d)? as f64 / (d * d) as f64,
            None => f64::NAN,
        };
        let rate = rate(row, Contender::Firebox);
        table.row([
            if *bits == 32 { algorithm.clone() } else { format!("{algorithm}, {bits} bits") },
            number(bytes),
            cell(ours),
            cell(torch[0]),
            cell(torch[1]),
            ratio.map_or_else(String::new, times),
            rate.map_or_else(String::new, |rate| number(rate / 1e9)),
            rate.map_or_else(String::new, |rate| percent(rate / copy)),
        ]);
    }
    let (count, d) = MATRICES;
    Ok(format!(
        "{count} matrices of {d} x {d}; GB/s of what a step must read and write: parameter, gradient and state once each. A copy \
         runs at {} GB/s, since it reads its target as well before it writes it. PyTorch's Muon has neither form.\n\n{table}",
        number(copy / 1e9)
    ))
}
