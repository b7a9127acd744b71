//! Finding a Vulkan driver for the wgpu tests.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cargo::output;
use crate::error::{Error, Result};
use crate::workspace::Workspace;

/// Where Vulkan's loader looks for driver manifests.
const MANIFEST_DIRS: [&str; 3] = ["/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d"];

/// What tells Vulkan's loader which drivers to use; the second name is that of older loaders.
const DRIVER_VARIABLES: [&str; 2] = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"];

/// The manifest of Mesa's software driver, lavapipe.
pub fn lavapipe() -> Option<PathBuf> {
    manifests().into_iter().find(|path| is_lavapipe(path))
}

/// Whether Vulkan's loader, which wgpu opens at run time, is there.
pub fn has_loader() -> bool {
    ["ldconfig", "/sbin/ldconfig"]
        .iter()
        .find_map(|program| output(program, &["-p"]))
        .is_some_and(|list| list.contains("libvulkan.so.1"))
}

/// The driver manifests on this machine, in a fixed order.
pub fn manifests() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = MANIFEST_DIRS
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    found.sort();
    found
}

/// The environment in which wgpu finds a driver, or what this machine lacks.
///
/// The software driver is preferred: it gives the same numbers on every machine. A driver that the caller names in
/// `VK_DRIVER_FILES` is respected.
pub fn environment(workspace: &Workspace) -> Result<std::result::Result<Vec<(&'static str, OsString)>, String>> {
    if !cfg!(target_os = "linux") {
        // Metal and DirectX 12 come with their systems.
        return Ok(Ok(vec![]));
    }
    if !has_loader() {
        return Ok(Err("Vulkan's loader, libvulkan.so.1".to_owned()));
    }
    let mut variables = vec![];
    if DRIVER_VARIABLES.iter().all(|name| env::var_os(name).is_none()) {
        if let Some(manifest) = lavapipe() {
            variables.extend(DRIVER_VARIABLES.map(|name| (name, manifest.clone().into_os_string())));
        } else if manifests().is_empty() {
            return Ok(Err("a Vulkan driver".to_owned()));
        }
    }
    if env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa wants a private folder; a system without a login session, as in a container, has none.
        let folder = private_folder(&workspace.target.join("xtask/xdg-runtime"))?;
        variables.push(("XDG_RUNTIME_DIR", folder.into_os_string()));
    }
    Ok(Ok(variables))
}

fn is_lavapipe(manifest: &Path) -> bool {
    manifest.file_name().is_some_and(|name| name.to_string_lossy().starts_with("lvp_icd"))
}

fn private_folder(path: &Path) -> Result<PathBuf> {
    fs::create_dir_all(path).map_err(Error::io("create the folder", path))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
            .map_err(Error::io("make private the folder", path))?;
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lavapipe_is_known_by_its_manifest() {
        assert!(is_lavapipe(Path::new("/x/lvp_icd.x86_64.json")));
        assert!(is_lavapipe(Path::new("/x/lvp_icd.json")));
        assert!(!is_lavapipe(Path::new("/x/intel_icd.x86_64.json")));
    }
}
