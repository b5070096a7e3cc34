//! The x86-64 part, and nearly all that is unsafe: entry, descriptors, exception stubs, page tables, ports, SVM and VMX, and the
//! pages that are shared with the monitor.

#[cfg(not(test))]
mod entry;
mod gdt;
pub mod idt;
pub mod journal;
pub mod l2;
#[cfg(not(test))]
mod lang;
pub mod legacy;
pub mod lock;
pub mod mailbox;
pub mod modes;
pub mod paging;
pub mod paging_legacy;
pub mod paravirtual;
pub mod port;
mod privileged;
pub mod probe;
pub mod provoke;
#[cfg(not(test))]
mod pvh;
mod registers;
pub mod ring0;
pub mod smm;
pub mod space;
pub mod svm;
pub mod table_words;
pub mod tracked;
pub mod tsc;
mod unpaged;
pub mod vcpu;
pub mod vmx;
