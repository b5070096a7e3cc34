//! Link arguments of the firmware images: freestanding, static, at a fixed address, by `link.ld`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=link.ld");
    let script = format!("{}/link.ld", std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--gc-sections",
        // Symbols stay: fault reports name them. The prebuilt core's debug information would be most of the file.
        "-Wl,--strip-debug",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,norelro",
        "-Wl,--no-eh-frame-hdr",
        &format!("-Wl,-T,{script}"),
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
