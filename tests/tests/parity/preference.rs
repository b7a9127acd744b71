//! Preferences (`golden/preference.py`): probabilities of answers, losses, gradients, steps.

use std::sync::Arc;

use firebox::models::Extra;
use firebox::optim::{Algorithm, SgdConfig};
use firebox::tensor::ops::Preference;

use super::*;

#[test]
fn preferences_are_pytorchs() {
    let Golden { model: first, entries, .. } = open("llama-tiny");
    let file = TensorFile::open(golden("preference.safetensors")).unwrap();
    let [b, t] = file.shape("input_ids").unwrap() else { panic!("input_ids must be [B, T]") };
    let batch = TokenBatch::plain(*b, *t, ints(&file, "input_ids"), ints(&file, "targets"));
    let log_p = distance(&to_host(first.log_probabilities(&batch)), &file.f32("log_probabilities").unwrap());
    assert!(log_p < LOSSES, "probabilities are {log_p:.2e} off");
    for (name, beta, label_smoothing) in [("plain", 0.1, 0.0), ("conservative", 0.5, 0.2)] {
        let reference = file.f32("reference").unwrap();
        let preference = Some(Arc::new(Preference { reference, beta, label_smoothing }));
        let extra = Some(Arc::new(Extra { preference, ..Extra::default() }));
        let batch = TokenBatch { loss_scale: 1.0 / (*b / 2) as f64, extra, ..batch.clone() };
        // As in evaluation, and in training.
        let value = to_host(first.loss(&batch, None));
        assert!(distance(&value, &file.f32(&format!("{name}.loss")).unwrap()) < LOSSES, "{name}: {value:?}");
        let plain = SgdConfig { momentum: 0.0, ..SgdConfig::default() };
        let mut optimizer = Optimizer::new(Algorithm::Sgd(plain), DecayRule::Matrices).unwrap();
        let mut model = first.clone();
        for (step, want) in file.f32(&format!("{name}.losses")).unwrap().iter().enumerate() {
            let loss = model.loss(&batch, Some(step as u64));
            let off = distance(&to_host(loss.clone().inner()), &[*want]);
            assert!(off < LOSSES, "{name}: the loss before step {step} is {off:.2e} off");
            let mut grads = NamedGrads::from_backward(&model, &mut loss.backward());
            if step == 0 {
                let mut seen = 0;
                for entry in &entries {
                    let grad = to_host(grads.get(&entry.param).unwrap().clone());
                    for piece in &entry.pieces {
                        let Ok(want) = file.f32(&format!("{name}.grad.{}", piece.name)) else { continue };
                        let off = distance(&entry.split(&grad, piece), &want);
                        assert!(off < GRADIENTS, "{name}: the gradient of {} is {off:.2e} off", piece.name);
                        seen += 1;
                    }
                }
                assert_eq!(seen, 5, "{name}: gradients compared");
            }
            model = optimizer.step(0.05, model, &mut grads).unwrap();
        }
    }
}
