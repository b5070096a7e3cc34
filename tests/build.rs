//! Tells the tests where the firmware's images are (see monitor/build.rs).

fn main() {
    let directory = std::env::var("DEP_UMBRA_FIRMWARE_DIR").expect("monitor/build.rs says where the images are");
    println!("cargo::rustc-env=UMBRA_FIRMWARE_DIR={directory}");
    println!("cargo::rerun-if-changed=build.rs");
}
