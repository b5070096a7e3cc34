//! Everything that is asserted about runs in the lab, on the Records of five boots (see [`boots`]); and what needs no machine, beside it.

mod boots;
mod figures;
mod matrix;
mod nested;
mod roots;
mod vmx;
