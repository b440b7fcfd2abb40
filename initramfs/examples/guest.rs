//! Packs a guest initramfs: PID 1 and, for a kernel that is not ours, its modules in load order.
//! For tests and benchmarks; the host image has its own packed by `holdfast-image`.

use std::{env, path::Path, process::ExitCode};

use holdfast_initramfs::guest::{Module, initramfs};

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [init, out, modules @ ..] = &arguments[..] else { return ExitCode::from(2) };
    match pack(init, out, modules) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log_error(&error.to_string());
            ExitCode::from(3)
        }
    }
}

fn pack(init: &str, out: &str, modules: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let module = |path: &String| -> Result<Module, Box<dyn std::error::Error>> {
        let name = Path::new(path).file_name().ok_or("a module without a name")?;
        Ok(Module { name: name.to_string_lossy().into_owned(), content: fs_err::read(path)? })
    };
    let modules: Vec<_> = modules.iter().map(module).collect::<Result<_, _>>()?;
    Ok(fs_err::write(out, initramfs(&fs_err::read(init)?, &modules)?)?)
}

fn log_error(text: &str) {
    use std::io::Write;
    // Where stderr is closed nobody reads it.
    let _ = writeln!(std::io::stderr(), "{text}");
}
