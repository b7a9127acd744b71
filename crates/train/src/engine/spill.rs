//! Activations on disk.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};

use crate::TrainError;
use crate::model_io::to_host;

/// Tensors in a file without a name, last in, first out.
#[derive(Debug)]
pub(super) struct Spill {
    file: File,
    dir: PathBuf,
    tensors: Vec<([usize; 3], Device)>,
}

impl Spill {
    /// An empty one on the disk of the folder `dir`, which is made if it is not there.
    pub(super) fn create(dir: &Path) -> Result<Self, TrainError> {
        let file = fs::create_dir_all(dir).and_then(|()| tempfile::tempfile_in(dir));
        Ok(Self { file: file.map_err(error("create a file for", dir))?, dir: dir.into(), tensors: vec![] })
    }

    /// Writes a tensor without gradients.
    pub(super) fn push(&mut self, x: &Tensor<3>) -> Result<(), TrainError> {
        self.tensors.push((x.dims(), x.device()));
        let values = to_host(x.clone());
        self.file.write_all(bytemuck::cast_slice(&values)).map_err(error("write", &self.dir))
    }

    /// Reads the last one and gives its space free: what is read soon enough never has to reach the disk.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn pop(&mut self) -> Result<Tensor<3>, TrainError> {
        // PANIC: the engine pops as often as it pushed.
        let (shape, device) = self.tensors.pop().expect("a tensor that was written");
        let mut values = vec![0f32; shape.iter().product()];
        let file = &mut self.file;
        let mut read = || -> io::Result<()> {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
            let start = file.seek(SeekFrom::End(-(bytes.len() as i64)))?;
            file.read_exact(bytes)?;
            file.set_len(start)?;
            file.seek(SeekFrom::Start(start)).map(drop)
        };
        read().map_err(error("read back", &self.dir))?;
        Ok(Tensor::from_data(TensorData::new(values, shape), &device))
    }
}

fn error(operation: &'static str, dir: &Path) -> impl FnOnce(io::Error) -> TrainError {
    let path = dir.into();
    move |source| TrainError::Offload { operation, path, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn last_in_first_out_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("run");
        let mut spill = Spill::create(&folder).unwrap();
        let device = Device::default();
        let tensor = |n: usize| {
            let values: Vec<f32> = (0..2 * n).map(|i| (i * n) as f32 - 0.1).collect();
            Tensor::<3>::from_data(TensorData::new(values, [1, 2, n]), &device)
        };
        for sizes in [&[3, 1, 700][..], &[5]] {
            sizes.iter().for_each(|&n| spill.push(&tensor(n)).unwrap());
            for &n in sizes.iter().rev() {
                let got = spill.pop().unwrap();
                assert_eq!((got.dims(), to_host(got)), ([1, 2, n], to_host(tensor(n))));
            }
            assert_eq!(spill.file.metadata().unwrap().len(), 0);
        }
        spill.push(&tensor(9)).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), usize::from(cfg!(windows)), "it has no name");
        drop(spill);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn errors_name_the_folder_and_a_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let text = Spill::create(&file).unwrap_err().to_string();
        assert!(text.contains("file") && text.contains("memory.offload"), "{text}");
    }
}
