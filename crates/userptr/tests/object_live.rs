// SPDX-License-Identifier: MIT OR Apache-2.0
//! Objects on memory of this process, with the kvm device and the cpu device, heard through the best source there is.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::primary::{HostMm, Source};
use hostmm::testing;
use hostmm::uffd::{self, UffdSource};
use interleave::{AtomicBool, MaySleep, Ordering, scope, time};
use mmu_notifier::{Access, GupError, PrimaryMmu, Range};
use userptr::device::cpu::Cpu;
use userptr::device::kvm::{KvmContext, KvmDevice, Polling};
use userptr::device::{
    Command, Device, DeviceAddr, DeviceError, Engine, Fence, FenceError, WaitError, checksum,
};
use userptr::object::{Driver, Flags, Iommu, Object, ObjectError};
use userptr::source::{self, AnonymousUffd, AnySource};

#[expect(dead_code, reason = "its main is not run")]
#[path = "../examples/objects.rs"]
mod objects;

const DEADLINE: Duration = Duration::from_secs(180);
const PAGE: usize = 4096;
const READ_ONLY: Flags = Flags { read_only: true, probe: false };

type Host = HostMm<AnySource>;

/// What a test does with any device.
trait Body {
    fn run<D: Device<Host> + Engine + 'static>(self, driver: Driver<Host, D>);
}

fn on_cpu(name: &str, body: impl Body) {
    if testing::require(Capability::IoUring) {
        testing::in_child(name, DEADLINE, || {
            body.run(Driver::new(source::open_mm(1).unwrap(), Cpu::new(), Iommu::passthrough()));
        });
    }
}

fn on_kvm(name: &str, body: impl Body) {
    if testing::require(Capability::IoUring) && testing::require(Capability::DevKvm) {
        testing::in_child(name, DEADLINE, || {
            body.run(kvm_driver(source::open_mm(1).unwrap()));
        });
    }
}

fn kvm_driver<S: Source + 'static>(mm: Arc<HostMm<S>>) -> Driver<HostMm<S>, KvmContext> {
    let device = KvmDevice::open(Polling::default()).unwrap();
    let iommu = Iommu::remapping(DeviceAddr(0x2000_0000_0000), 1 << 30);
    Driver::new(mm, device.context().unwrap(), iommu)
}

/// Pages of the kernel's choice, which only devices and this test's raw accesses use.
struct Pages(*mut u8);

impl Pages {
    fn new(pages: usize) -> Pages {
        Pages::at(std::ptr::null_mut(), pages, 0)
    }

    fn at(addr: *mut u8, pages: usize, flags: i32) -> Pages {
        let (rw, anon) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory, or in the place of such, which nothing refers to.
        let at = unsafe { libc::mmap(addr.cast(), pages * PAGE, rw, anon | flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Pages(at.cast())
    }

    fn replace(&self, page: usize, pages: usize) {
        Pages::at(self.0.wrapping_add(page * PAGE), pages, libc::MAP_FIXED);
    }

    fn unmap(&self, page: usize, pages: usize) {
        // SAFETY: nothing refers to it.
        assert_eq!(unsafe { libc::munmap(self.0.wrapping_add(page * PAGE).cast(), pages * PAGE) }, 0);
    }

    fn set(&self, offset: usize, value: u8) {
        // SAFETY: mapped memory that no reference points to.
        unsafe { self.0.wrapping_add(offset).write_volatile(value) };
    }

    fn get(&self, offset: usize) -> u8 {
        // SAFETY: mapped memory that no reference points to.
        unsafe { self.0.wrapping_add(offset).read_volatile() }
    }

    fn object<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static>(
        &self,
        driver: &Driver<M, D>,
        offset: usize,
        len: usize,
        flags: Flags,
    ) -> Object<M, D> {
        // SAFETY: no reference ever points to these pages, and the tests write them when no batch is in flight.
        unsafe { driver.object_at(self.0.wrapping_add(offset).addr(), len, flags) }.unwrap()
    }
}

fn not_mapped(error: ObjectError) -> bool {
    matches!(error, ObjectError::Device(DeviceError::Pages(GupError::NotMapped { .. })))
}

/// Memory is replaced, vanishes, comes back.
struct Replaced;

impl Body for Replaced {
    fn run<D: Device<Host> + Engine + 'static>(self, driver: Driver<Host, D>) {
        let memory = Pages::new(4);
        let from = memory.object(&driver, 0, 3 * PAGE, READ_ONLY);
        let mut to = driver.object(vec![0_u8; 2], Flags::default()).unwrap();
        let space = driver.space();
        let src = space.bind(&from, Some(DeviceAddr(0x1234_5000))).unwrap();
        let dst = space.bind(&to, None).unwrap();
        let look = |to: &Object<Host, D>| {
            let far = DeviceAddr(src.0 + 2 * PAGE as u64);
            let copies = [
                Command::Copy { dst, src, len: 1 },
                Command::Copy { dst: DeviceAddr(dst.0 + 1), src: far, len: 1 },
            ];
            space.execute(&[&from, to], &copies).map(|execution| execution.wait().unwrap())
        };
        for value in 1..20 {
            memory.set(0, value);
            memory.set(2 * PAGE, value + 1);
            look(&to).unwrap();
            assert_eq!(to.bytes().unwrap(), [value, value + 1]);
            memory.replace(0, 3);
        }
        assert!(driver.stats().got >= 20, "{:?}", driver.stats());
        memory.unmap(2, 1);
        assert!(not_mapped(look(&to).unwrap_err()));
        memory.replace(2, 1);
        memory.set(2 * PAGE, 9);
        look(&to).unwrap();
        assert_eq!(to.bytes().unwrap()[1], 9);
        memory.unmap(0, 4);
        assert!(not_mapped(look(&to).unwrap_err()));
    }
}

#[test]
fn memory_is_replaced_and_vanishes_on_cpu() {
    on_cpu("memory_is_replaced_and_vanishes_on_cpu", Replaced);
}

#[test]
fn memory_is_replaced_and_vanishes_on_kvm() {
    on_kvm("memory_is_replaced_and_vanishes_on_kvm", Replaced);
}

/// A source that forgets a range when it is unmapped, and has to be told again.
#[test]
fn memory_is_replaced_and_vanishes_over_uffd() {
    if !testing::require(Capability::IoUring) || !testing::require(Capability::Userfaultfd) {
        return;
    }
    testing::in_child("memory_is_replaced_and_vanishes_over_uffd", DEADLINE, || {
        let uffd = UffdSource::open(&uffd::Options::default()).unwrap();
        let source = AnySource::Uffd(AnonymousUffd::new(uffd).unwrap());
        let mm = Arc::new(HostMm::new(source, 1).unwrap());
        Replaced.run(Driver::new(mm, Cpu::new(), Iommu::passthrough()));
    });
}

/// Small objects in one page, each with its neighbours.
struct ByteExact;

impl Body for ByteExact {
    fn run<D: Device<Host> + Engine + 'static>(self, driver: Driver<Host, D>) {
        let memory = Pages::new(2);
        let offset = PAGE - 5;
        let small = memory.object(&driver, offset, 11, Flags::default());
        let overlapping = memory.object(&driver, 0, 2 * PAGE, READ_ONLY);
        let mut sum = driver.object(vec![0_u8; 8], Flags::default()).unwrap();
        let space = driver.space();
        let at = space.bind(&small, None).unwrap();
        let all = space.bind(&overlapping, None).unwrap();
        let result = space.bind(&sum, None).unwrap();
        let fill = |at: u64, len| Command::Fill { dst: DeviceAddr(at), len, byte: 7 };
        for beside in [fill(at.0 - 1, 1), fill(at.0, 12), fill(at.0 + 11, 1), fill(all.0, 1)] {
            let refused = space.execute(&[&small, &overlapping], &[beside]).unwrap_err();
            assert!(matches!(refused, ObjectError::NotBound { .. }), "{refused}");
        }
        let unlisted = space.execute(&[&overlapping], &[fill(at.0, 1)]).unwrap_err();
        assert!(matches!(unlisted, ObjectError::NotBound { .. }), "{unlisted}");
        let commands = [fill(at.0, 11), Command::Checksum { src: all, len: 2 * PAGE as u64, result }];
        space.execute(&[&small, &overlapping, &sum], &commands).unwrap().wait().unwrap();
        let bytes: Vec<u8> = (0..2 * PAGE).map(|n| memory.get(n)).collect();
        assert!(
            bytes.iter().enumerate().all(|(n, b)| *b == 7 * u8::from((offset..offset + 11).contains(&n)))
        );
        assert_eq!(sum.bytes().unwrap(), checksum(&bytes).to_le_bytes());
        drop((small, overlapping));
        memory.unmap(0, 2);
    }
}

#[test]
fn neighbours_are_not_touched_on_cpu() {
    on_cpu("neighbours_are_not_touched_on_cpu", ByteExact);
}

#[test]
fn neighbours_are_not_touched_on_kvm() {
    on_kvm("neighbours_are_not_touched_on_kvm", ByteExact);
}

/// Batches while another thread gives the memory up, fork copies it, and objects come and go busy.
struct Churn;

impl Body for Churn {
    fn run<D: Device<Host> + Engine + 'static>(self, driver: Driver<Host, D>) {
        let memory = Pages::new(4);
        let stop = AtomicBool::new(false);
        let addr = memory.0.addr();
        MaySleep::enter(|cx| {
            scope(cx, |threads, _| {
                let stop = &stop;
                threads.spawn("churn", move |cx| {
                    while !stop.load(Ordering::Relaxed) {
                        // SAFETY: nothing refers to the memory, and devices may see it go.
                        let gone = unsafe {
                            libc::madvise(
                                std::ptr::without_provenance_mut(addr),
                                4 * PAGE,
                                libc::MADV_DONTNEED,
                            )
                        };
                        assert_eq!(gone, 0);
                        time::sleep(cx, Duration::from_micros(300));
                    }
                });
                for round in 0..60_u8 {
                    let from = driver.object(vec![round; 3 * PAGE], READ_ONLY).unwrap();
                    let over = memory.object(&driver, 1, 3 * PAGE, Flags::default());
                    let mut to = driver.object(vec![!round; 3 * PAGE], Flags::default()).unwrap();
                    let space = driver.space();
                    let bind = |object| space.bind(object, None).unwrap();
                    let (src, there, dst) = (bind(&from), bind(&over), bind(&to));
                    let len = 3 * PAGE as u64;
                    let commands = [Command::Copy { dst, src, len }, Command::Copy { dst: there, src, len }];
                    let first = loop {
                        match space.execute(&[&from, &over, &to], &commands) {
                            Ok(execution) => break execution,
                            // Again, as user space does with EAGAIN.
                            Err(ObjectError::Unsettled { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    };
                    drop((over, from));
                    assert!(to.bytes().unwrap().iter().all(|byte| *byte == round));
                    assert!(first.is_done());
                    first.wait().unwrap();
                    assert_eq!(to.into_bytes().unwrap()[..], vec![round; 3 * PAGE]);
                }
                stop.store(true, Ordering::Relaxed);
            });
        });
    }
}

#[test]
fn busy_objects_come_and_go_beside_churn_on_cpu() {
    on_cpu("busy_objects_come_and_go_beside_churn_on_cpu", Churn);
}

#[test]
fn busy_objects_come_and_go_beside_churn_on_kvm() {
    on_kvm("busy_objects_come_and_go_beside_churn_on_kvm", Churn);
}

/// In a forked child everything is refused, and nothing hangs when it is dropped.
struct Forked;

impl Body for Forked {
    fn run<D: Device<Host> + Engine + 'static>(self, driver: Driver<Host, D>) {
        let mut object = driver.object(vec![1_u8; 10], Flags::default()).unwrap();
        let space = driver.space();
        let dst = space.bind(&object, None).unwrap();
        let fill = [Command::Fill { dst, len: 10, byte: 2 }];
        space.execute(&[&object], &fill).unwrap().wait().unwrap();
        // SAFETY: the child calls nothing that another thread's lock could be needed for but the allocator, which libc
        // makes ready for it.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let refused = space.execute(&[&object], &fill);
            let bytes = object.into_bytes();
            let right =
                matches!(refused, Err(ObjectError::Forked)) && bytes.is_some_and(|b| b[..] == [2; 10]);
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(i32::from(!right)) };
        }
        let mut status = 0;
        // SAFETY: `status` is ours.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        let again = [Command::Fill { dst, len: 10, byte: 3 }];
        space.execute(&[&object], &again).unwrap().wait().unwrap();
        assert_eq!(object.bytes().unwrap(), [3; 10]);
    }
}

#[test]
fn a_foreign_process_is_refused_on_cpu() {
    on_cpu("a_foreign_process_is_refused_on_cpu", Forked);
}

#[test]
fn a_foreign_process_is_refused_on_kvm() {
    on_kvm("a_foreign_process_is_refused_on_kvm", Forked);
}

/// A batch is held back in the queue while its memory goes. The device faults, and says where in the addresses of the
/// space; who wants to free its pages meanwhile waits.
#[test]
fn a_batch_in_flight_faults_where_its_memory_has_gone() {
    if !testing::require(Capability::IoUring) || !testing::require(Capability::DevKvm) {
        return;
    }
    testing::in_child("a_batch_in_flight_faults_where_its_memory_has_gone", DEADLINE, || {
        let device = KvmDevice::open(Polling::default()).unwrap();
        let iommu = Iommu::remapping(DeviceAddr(0x2000_0000_0000), 1 << 30);
        let driver = Driver::new(source::open_mm(1).unwrap(), device.context().unwrap(), iommu);
        let (memory, semaphore) = (Pages::new(2), Pages::new(1));
        let gate = Range::new(semaphore.0.addr() as u64, PAGE as u64).unwrap();
        let object = memory.object(&driver, 0, 2 * PAGE, Flags::default());
        let space = driver.space();
        let at = space.bind(&object, Some(DeviceAddr(0x9000))).unwrap();
        object.get_pages().unwrap();
        MaySleep::enter(|cx| {
            let mapping = driver.device().map_range(cx, gate, Access::Read, None).unwrap();
            let held = driver.device().submit_wait(cx, mapping.address(), 1).unwrap();
            let fill =
                |offset: usize| Command::Fill { dst: DeviceAddr(at.0 + offset as u64), len: 8, byte: 1 };
            let batch = space.execute(&[&object], &[fill(0), fill(PAGE + 16)]).unwrap();
            memory.unmap(1, 1);
            assert!(!object.has_pages() && !batch.is_done());
            semaphore.set(0, 1);
            held.wait(cx).unwrap();
            let Err(FenceError::Fault(fault)) = batch.wait() else { panic!("nothing is mapped there") };
            let there = DeviceAddr(0x9000 + PAGE as u64 + 16);
            assert_eq!((fault.command, fault.addr, fault.access), (1, there, Access::Write));
            assert_eq!(memory.get(0), 1, "what came before it was executed");
            driver.device().unmap_range(cx, mapping);
        });
        assert!(not_mapped(object.get_pages().unwrap_err()));
    });
}

struct Example;

impl Body for Example {
    fn run<D: Device<Host> + Engine + 'static>(self, driver: Driver<Host, D>) {
        let picture = objects::paint(&driver).unwrap();
        assert_eq!(picture.iter().filter(|point| **point == b'#').count(), 6 * 9);
        assert_eq!(&picture[..10], b"###.......");
    }
}

#[test]
fn the_example_paints_on_cpu() {
    on_cpu("the_example_paints_on_cpu", Example);
}

#[test]
fn the_example_paints_on_kvm() {
    on_kvm("the_example_paints_on_kvm", Example);
}

/// A command hangs, and a batch behind it. Its owner gives up waiting, by time and by signal, while another thread goes on
/// waiting; the context is reset, everybody is told, and the next batch runs.
#[test]
fn a_wait_for_what_hangs_is_given_up_and_the_reset_is_told() {
    extern "C" fn nothing(_: i32) {}
    const SOON: Duration = Duration::from_millis(20);
    if ![Capability::IoUring, Capability::DevKvm, Capability::Userfaultfd].into_iter().all(testing::require) {
        return;
    }
    testing::in_child("a_wait_for_what_hangs_is_given_up_and_the_reset_is_told", DEADLINE, || {
        // Told of changes of this process alone: to get pages again is an update of page tables, which would hang as well.
        let source = AnonymousUffd::new(UffdSource::open(&uffd::Options::default()).unwrap()).unwrap();
        let driver = kvm_driver(Arc::new(HostMm::new(source, 1).unwrap()));
        let (semaphore, memory) = (Pages::new(1), Pages::new(1));
        let (context, space) = (driver.device(), driver.space());
        let object = memory.object(&driver, 0, PAGE, Flags::default());
        let dst = space.bind(&object, None).unwrap();
        let fill = |byte| space.execute(&[&object], &[Command::Fill { dst, len: 1, byte }]).unwrap();
        let handler: extern "C" fn(i32) = nothing;
        // SAFETY: the handler does nothing.
        unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        MaySleep::enter(|cx| {
            let range = Range::new(semaphore.0.addr() as u64, PAGE as u64).unwrap();
            let mapping = context.map_range(cx, range, Access::Write, None).unwrap();
            object.get_pages().unwrap();
            for round in 1..6 {
                let hung = context.submit_wait(cx, mapping.address(), 1).unwrap();
                let behind = fill(100);
                let done = AtomicBool::new(false);
                scope(cx, |threads, cx| {
                    let idler = threads.spawn("idler", |_| object.wait_idle());
                    let (process, waiter) =
                        (std::process::id(), rustix::thread::gettid().as_raw_nonzero().get());
                    let signals = threads.spawn("signals", {
                        let done = &done;
                        move |cx| {
                            while !done.load(Ordering::SeqCst) {
                                time::sleep(cx, SOON / 4);
                                // SAFETY: the thread waits for this one, so its id is its own.
                                unsafe { libc::syscall(libc::SYS_tgkill, process, waiter, libc::SIGUSR1) };
                            }
                        }
                    });
                    assert_eq!(behind.wait_interruptible(None), Err(WaitError::Interrupted));
                    done.store(true, Ordering::SeqCst);
                    signals.join(cx).unwrap();
                    // The last signal may have come by now, but not two.
                    let ended = [(); 2].map(|()| behind.wait_interruptible(Some(SOON)));
                    assert!(ended.contains(&Err(WaitError::TimedOut(SOON))), "{ended:?}");
                    assert!(!behind.is_done() && object.has_pages());
                    assert_eq!(memory.get(0), round - 1);
                    context.kill(cx, "it hangs");
                    idler.join(cx).unwrap();
                });
                assert!(matches!(hung.wait(cx), Err(FenceError::Killed { .. })));
                assert_eq!(behind.wait_interruptible(None), Ok(()));
                for _ in 0..2 {
                    assert!(matches!(behind.wait(), Err(FenceError::Killed { why }) if why == "it hangs"));
                }
                fill(round).wait().unwrap();
                assert_eq!(memory.get(0), round);
            }
            context.unmap_range(cx, mapping);
        });
    });
}
