//! Training of a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019) with Hugging
//! Face's `tokenizers`.

use super::{END_OF_TEXT, SMALLEST_BPE, Tokenizer, alphabet, gpt2};
use crate::error::DataError;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Trainer};

impl Tokenizer {
    /// Trains a byte-level BPE with GPT-2's pre-tokenizer on the texts. `<|endoftext|>` is token 0, the 256 bytes
    /// follow, then the merges. The same texts, in whatever order, give the same tokenizer.
    ///
    /// Bytes that are not UTF-8 do not take part; they are encoded as single bytes.
    ///
    /// # Errors
    /// When `vocab_size` is below 257.
    pub fn train_bpe<T: AsRef<[u8]> + Sync>(texts: &[T], vocab_size: usize) -> Result<Self, DataError> {
        if vocab_size < SMALLEST_BPE {
            let reason =
                format!("too small: byte-level BPE needs at least {SMALLEST_BPE} (256 bytes and <|endoftext|>)");
            return Err(DataError::BadConfig { key: "vocab_size", value: vocab_size.to_string(), reason });
        }
        let failed = |e: tokenizers::Error| DataError::Tokenizer { operation: "train", reason: e.to_string() };
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        let valid = texts.iter().flat_map(|t| t.as_ref().utf8_chunks().map(|c| c.valid()));
        // Small pieces keep the lists of words, of which each thread holds one, small.
        let pieces = valid.flat_map(|text| {
            let mut rest = text;
            std::iter::from_fn(move || {
                let at = crate::read::char_boundary(rest.as_bytes(), 1 << 14);
                let (piece, tail) = rest.split_at(at);
                rest = tail;
                (!piece.is_empty()).then_some(piece)
            })
        });
        trainer
            .feed(pieces, |piece| {
                let mut words = Vec::new();
                gpt2::words(piece, |word| words.push(alphabet::to_chars(word)));
                Ok(words)
            })
            .map_err(failed)?;
        let mut bpe = BPE::default();
        let special = trainer.train(&mut bpe).map_err(failed)?;
        let mut tokenizer = tokenizers::Tokenizer::new(bpe);
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_post_processor(Some(ByteLevel::new(false, false, true)));
        tokenizer.add_special_tokens(special).map_err(failed)?;
        Self::from_json(tokenizer.to_string(true).map_err(failed)?)
    }
}
