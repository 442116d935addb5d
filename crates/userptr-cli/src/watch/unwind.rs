// SPDX-License-Identifier: MIT OR Apache-2.0
//! The callers of a function, by the tables that compilers leave for exceptions (.eh_frame): right with and without frame
//! pointers, as far as the words of the stack that were recorded reach.
//!
//! The rules of a file are about addresses as the file states them, and its stack is as absolute as any, so nothing here
//! depends on where a program has mapped the file: each file is read once for all programs. x86-64.

use super::calls::Calls;
use super::elf::{self, Data, Elf, Segments};
use super::tally::Site;
use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use framehop::{ExplicitModuleSectionInfo, FrameAddress, Module, Unwinder};
use hostmm::kvm::stream::Change;
use object::{Object, ObjectSection};
use std::collections::HashMap;
use std::fmt;

/// No stack is followed further: what is recorded of it ends before.
const DEEPEST: usize = 64;

/// The files that were read so far.
#[derive(Default)]
pub(super) struct Unwind {
    files: HashMap<String, Option<Code>>,
    cache: CacheX86_64,
}

impl fmt::Debug for Unwind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unwind").field("files", &self.files.len()).finish_non_exhaustive()
    }
}

/// The rules of one file.
struct Code {
    unwinder: UnwinderX86_64<Vec<u8>>,
    segments: Segments,
}

impl Unwind {
    /// The innermost caller that is `wanted`. `place` says where an address lies; `None` where the stack could not be
    /// followed so far.
    pub(super) fn caller(
        &mut self,
        change: &Change,
        place: impl Fn(u64) -> Option<Site>,
        wanted: impl Fn(&Site) -> bool,
        calls: &mut Calls,
    ) -> Option<Site> {
        let mut address = FrameAddress::from_instruction_pointer(*change.stack.first()?);
        let mut regs = UnwindRegsX86_64::new(address.address(), change.sp, change.bp);
        let mut word = |at: u64| {
            let index = at.checked_sub(change.sp).filter(|offset| offset % 8 == 0).ok_or(())? / 8;
            change.top.get(usize::try_from(index).map_err(drop)?).copied().ok_or(())
        };
        for _ in 0..DEEPEST {
            let site = place(address.address_for_lookup())?;
            if address.is_return_address() && wanted(&site) {
                return Some(site);
            }
            let code = self.files.entry(site.file).or_insert_with_key(|file| Code::read(file)).as_ref()?;
            let stated = code.segments.address(site.offset)?;
            let stated = match address {
                FrameAddress::InstructionPointer(_) => FrameAddress::from_instruction_pointer(stated),
                FrameAddress::ReturnAddress(_) => FrameAddress::from_return_address(stated + 1)?,
            };
            let next = code.unwinder.unwind_frame(stated, &mut regs, &mut self.cache, &mut word).ok()??;
            address = FrameAddress::from_return_address(next)?;
            // Where there are no rules the frame pointer is followed, which may be none.
            let back = place(address.address_for_lookup())?;
            if !calls.one_ends_at(&back.file, back.offset + 1) {
                return None;
            }
        }
        None
    }
}

impl Code {
    fn read(path: &str) -> Option<Code> {
        let data = Data::new(elf::open(path)?);
        let file = Elf::parse(&data).ok()?;
        let section = |name| {
            let section = file.section_by_name(name)?;
            let stated = section.address()..section.address().checked_add(section.size())?;
            Some((stated, section.data().ok()?.to_vec()))
        };
        let (eh_frame_svma, eh_frame) = section(".eh_frame").unzip();
        let (eh_frame_hdr_svma, eh_frame_hdr) = section(".eh_frame_hdr").unzip();
        let sections = ExplicitModuleSectionInfo {
            eh_frame_svma,
            eh_frame,
            eh_frame_hdr_svma,
            eh_frame_hdr,
            text_svma: file.section_by_name(".text").map(|s| s.address()..s.address() + s.size()),
            got_svma: file.section_by_name(".got").map(|s| s.address()..s.address() + s.size()),
            ..ExplicitModuleSectionInfo::default()
        };
        let mut unwinder = UnwinderX86_64::new();
        unwinder.add_module(Module::new(path.to_owned(), 0..u64::MAX, 0, sections));
        Some(Code { unwinder, segments: Segments::of(&file) })
    }
}
