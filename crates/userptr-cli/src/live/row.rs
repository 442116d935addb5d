// SPDX-License-Identifier: MIT OR Apache-2.0
//! One event, one source, one device, in a process of its own: set up, give the page to the device, change the
//! memory, ask the source when the system call has returned and when another thread sees the new bytes, then use the
//! device again as the contract wants it and compare it with the program.
//!
//! The device knows nothing of the source. What it is given at its next use follows the protocol of
//! `mmu_notifier::primary`: a translation is used if `read_retry` says no, else it is got again.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use hostmm::disturb::{After, Arena, Change, DisturbError, Event, Observer, Outcome, catalogue};
use hostmm::kvm::{self, KvmSource};
use hostmm::page::{Pages, PidOrSelf};
use hostmm::pin::{Pin, PinError, Pinner};
use hostmm::primary::{HostMm, HostSubscription, KvmWatch, LiveWatch, Source};
use hostmm::uffd::{self, UffdSource};
use interleave::{AtomicBool, MaySleep};
use mmu_notifier::{Access, PageAddr, Pfn, PrimaryMmu, Range, Subscription};

use super::report::{Found, Heard, Part};

/// How often a device tries to map a page that changes meanwhile.
const ATTEMPTS: u32 = 1000;

/// How often an event is tried that the kernel may pass over.
const TRIES: u32 = 4;

/// Why a row gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RowError {
    /// No such event.
    #[error("there is no event {0}: `userptr live --list` names them")]
    NoEvent(String),
    /// Neither `none` nor a source.
    #[error("there is no source {0}")]
    NoSource(String),
    /// Neither `pinned` nor `unpinned`.
    #[error("there is no device {0}")]
    NoDevice(String),
    /// The event was not made.
    #[error(transparent)]
    Disturb(#[from] hostmm::disturb::DisturbError),
    /// The kvm source does not open.
    #[error("the kvm source does not open: {0}")]
    Kvm(#[from] kvm::OpenError),
    /// The uffd source does not open.
    #[error("the uffd source does not open: {0}")]
    Uffd(#[from] uffd::OpenError),
    /// The parts around the source are not there.
    #[error(transparent)]
    Host(#[from] hostmm::primary::HostError),
    /// The page's frame cannot be told.
    #[error(transparent)]
    Page(#[from] hostmm::page::PageError),
    /// The device failed.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// Something kept changing the page.
    #[error("{0} changed at each of {ATTEMPTS} attempts to map it again")]
    Restless(Range),
    /// The source has gone.
    #[error(transparent)]
    Gone(#[from] mmu_notifier::Gone),
}

/// The event with this name.
pub(crate) fn find(name: &str) -> Result<&'static Event, RowError> {
    catalogue().into_iter().find(|e| e.name == name).ok_or_else(|| RowError::NoEvent(name.into()))
}

/// What a child process does.
pub(crate) fn run(event: &str, source: &str, device: &str) -> Result<Part, RowError> {
    let event = find(event)?;
    let kind = match device {
        "pinned" => Kind::Pinned,
        "unpinned" => Kind::Unpinned,
        other => return Err(RowError::NoDevice(other.into())),
    };
    match source {
        "none" => settle::<KvmSource>(event, kind, None),
        "kvm" => {
            let options = kvm::Options { age: event.name == AGEING, ..kvm::Options::default() };
            settle(event, kind, Some(&HostMm::new(KvmSource::open(&options)?, 1)?))
        }
        "uffd" => settle(event, kind, Some(&HostMm::new(UffdSource::open(&uffd::Options::default())?, 1)?)),
        other => Err(RowError::NoSource(other.into())),
    }
}

/// Make the event; again if the kernel, for reasons of its own, did not: reclaim and compaction pass pages over that
/// are on their way between lists.
fn settle<S: Source>(event: &Event, kind: Kind, mm: Option<&HostMm<S>>) -> Result<Part, RowError>
where
    S::Watch: Hear,
{
    let mut tries = 1..TRIES;
    loop {
        let made = with(event, kind, mm);
        let passed_over = match &made {
            Ok(part) => part.found == Found::Prevented && kind.declared(event) != Outcome::Prevented,
            Err(RowError::Disturb(DisturbError::Timeout { .. })) => true,
            Err(_) => false,
        };
        if !passed_over || tries.next().is_none() {
            return made;
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Pinned,
    Unpinned,
}

impl Kind {
    fn declared(self, event: &Event) -> Outcome {
        match self {
            Kind::Pinned => event.expect.pinned,
            Kind::Unpinned => event.expect.unpinned,
        }
    }
}

/// The event whose notification takes accessed bits and no translation.
const AGEING: &str = "page_ageing";

/// What a device needs, and what it holds of the watched page.
struct Device {
    pages: Pages,
    /// `None`: it does not pin.
    pinner: Option<Pinner>,
    held: Held,
}

enum Held {
    Nothing,
    /// The page itself; the bytes are read back through the device.
    Page(Pin),
    /// Its frame number.
    Frame(Pfn),
}

impl Device {
    fn new(kind: Kind) -> Result<Device, RowError> {
        let pages = Pages::open(PidOrSelf::Myself)?;
        let pinner = match kind {
            Kind::Pinned => Some(Pinner::new(1)?),
            Kind::Unpinned => None,
        };
        Ok(Device { pages, pinner, held: Held::Nothing })
    }

    /// Map `page`. False if such a device cannot have it, as declared.
    fn map_first(&mut self, page: Range, declared: Outcome) -> Result<bool, RowError> {
        match self.map(page) {
            Ok(()) => Ok(true),
            Err(_) if declared == Outcome::NotMappable => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Map what is at `page` now, which may be nothing or nothing for a device: then it holds nothing.
    fn map_again(&mut self, page: Range) -> Result<(), RowError> {
        match self.map(page) {
            Ok(()) | Err(RowError::Pin(_)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn unmap(&mut self) {
        self.held = Held::Nothing;
    }

    fn map(&mut self, page: Range) -> Result<(), RowError> {
        // The old pin first: there is one slot, as in a device whose table is full.
        self.unmap();
        self.held = match &self.pinner {
            Some(pinner) => Held::Page(pinner.pin(page)?),
            None => frame(&self.pages, page.first_page())?.map_or(Held::Nothing, Held::Frame),
        };
        Ok(())
    }

    /// Does it work on another page than the program, which sees `after`?
    fn is_stale(&self, page: Range, after: After) -> Result<bool, RowError> {
        Ok(match &self.held {
            Held::Nothing => false,
            Held::Page(pin) => {
                let mut bytes = [0; 8];
                pin.read_through(0, &mut bytes)?;
                after != After::Stamp(u64::from_ne_bytes(bytes))
            }
            Held::Frame(pfn) => {
                after == After::Faults || frame(&self.pages, page.first_page())? != Some(*pfn)
            }
        })
    }
}

/// What a source can be asked about ageing.
trait Hear: LiveWatch {
    /// Counts of ageing up to now.
    type Age: Copy + Send + Sync;
    fn age(&self) -> Option<Self::Age>;
    fn aged_since(&self, age: Self::Age) -> bool;
}

impl Hear for KvmWatch {
    type Age = kvm::Seq;

    fn age(&self) -> Option<kvm::Seq> {
        self.kvm().age_snapshot().ok().flatten()
    }

    fn aged_since(&self, age: kvm::Seq) -> bool {
        self.kvm().aged_since(age)
    }
}

impl Hear for uffd::Watch {
    type Age = ();

    fn age(&self) -> Option<()> {
        None
    }

    fn aged_since(&self, (): ()) -> bool {
        false
    }
}

/// One who listens and does nothing else.
struct Ears<W: Hear> {
    sub: HostSubscription<W>,
    seq: W::Seq,
    ageing: Option<W::Age>,
}

impl<W: Hear> Ears<W> {
    fn open<S: Source<Watch = W>>(mm: &HostMm<S>, changed: Range, ageing: bool) -> Result<Ears<W>, String> {
        let sub = mm.watch(changed).map_err(|e| e.to_string())?;
        let seq = sub.snapshot().map_err(|e| e.to_string())?;
        let ageing = if ageing { sub.watch().age() } else { None };
        Ok(Ears { sub, seq, ageing })
    }

    fn heard(&self) -> bool {
        match self.ageing {
            Some(age) => self.sub.watch().aged_since(age),
            None => self.sub.read_retry(self.seq),
        }
    }
}

fn frame(pages: &Pages, page: PageAddr) -> Result<Option<Pfn>, RowError> {
    match pages.identity(page) {
        Ok(identity) => Ok(identity.pfn().map(|pfn| Pfn(pfn.get()))),
        Err(hostmm::page::PageError::Unmapped { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn with<S: Source>(event: &Event, kind: Kind, mm: Option<&HostMm<S>>) -> Result<Part, RowError>
where
    S::Watch: Hear,
{
    let mut arena = Arena::new(super::scratch());
    let mut scene = event.setup(&mut arena)?;
    let page = scene.watched();
    let mut device = Device::new(kind)?;
    // Nobody can be given what no device can be given: the memory of another process.
    let not_ours = event.expect.unpinned == Outcome::NotMappable;
    let was = frame(&device.pages, page.first_page())?;
    let mapped = if not_ours { false } else { device.map_first(page, kind.declared(event))? };
    let moved_by_mapping = frame(&device.pages, page.first_page())? != was;

    let (mut ears, mut user, mut refused) = (None, None, None);
    if let Some(mm) = mm {
        match Ears::open(mm, scene.changed(), event.name == AGEING) {
            Ok(opened) => ears = Some(opened),
            Err(why) => refused = Some(why),
        }
        if refused.is_none() {
            match mm.watch(page) {
                Ok(sub) => {
                    let seq = MaySleep::enter(|cx| sub.read_begin(cx))?;
                    user = Some((sub, seq));
                }
                Err(why) => refused = Some(why.to_string()),
            }
        }
    }

    let heard = || ears.as_ref().is_some_and(Ears::heard);
    let at_return = Cell::new(false);
    let at_sight = AtomicBool::new(false);
    let observer = Observer::new(page, scene.before());
    let visible = scene.is_visible();
    let mut change = || scene.disturb(&mut || at_return.set(heard()));
    // The control asks nobody, and an observer may be given the freed frame when it looks: the change would then
    // seem not to have happened.
    let change = if visible && ears.is_some() {
        observer.during(&|_| at_sight.store(heard(), Ordering::Release), change).0?
    } else {
        change()?
    };
    let happened = change == Change::Happened;
    // Where the pin has made the change, before anybody listened, the event finds nothing left to announce.
    let report = ears.as_ref().filter(|_| happened && !moved_by_mapping).map(|ears| Heard {
        reported: ears.heard(),
        before_return: at_return.get(),
        before_visible: visible.then(|| at_sight.load(Ordering::Acquire)),
    });

    if !mapped {
        return Ok(Part { found: Found::NotMappable, heard: report, refused });
    }
    if refused.is_some() {
        // Nothing is cached of memory that cannot be watched: each use maps anew.
        device.map_again(page)?;
    }
    if let Some((sub, seq)) = &user
        && sub.read_retry(*seq)
    {
        MaySleep::enter(|cx| -> Result<(), RowError> {
            for _ in 0..ATTEMPTS {
                // A subscription that died with its mapping has no sequence any more; its user would make a new one.
                let seq = sub.read_begin(cx).ok();
                device.unmap();
                if mm.is_some_and(|mm| mm.fault_in(cx, page, Access::Read).is_ok()) {
                    device.map_again(page)?;
                }
                if seq.is_none_or(|seq| !sub.read_retry(seq)) {
                    return Ok(());
                }
            }
            Err(RowError::Restless(page))
        })?;
    }
    let after = if happened { scene.after() } else { After::Stamp(scene.before()) };
    let stale = device.is_stale(page, after)?;
    let found = match (stale, happened && !moved_by_mapping) {
        (true, _) => Found::Stale,
        (false, false) => Found::Prevented,
        (false, true) => Found::Coherent,
    };
    Ok(Part { found, heard: report, refused })
}
