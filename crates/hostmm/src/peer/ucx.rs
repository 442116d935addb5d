// SPDX-License-Identifier: MIT OR Apache-2.0
//! UCX's registration cache, `ucs_rcache` of UCX 1.13 as Debian 12 has it, loaded at run time.
//!
//! It learns of changes by patching munmap, mmap, madvise and others in the running process. Its layouts are those of
//! `ucs/memory/rcache.h` of that version; another version is refused.
//!
//! Invariant: the process has one thread when the library is loaded and a cache is made, since code is patched then.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::ptr::{NonNull, null_mut};

use interleave::{AtomicU64, Ordering};

/// How to get it.
pub const HOW_TO_INSTALL: &str = "apt-get install libucx0 (UCX 1.13, as in Debian 12)";

/// Of `ucm/api/ucm.h`.
const UCM_EVENT_VM_UNMAPPED: c_int = 1 << 17;
const OK: i8 = 0;
const IO_ERROR: i8 = -3;
const PAGE: usize = mmu_notifier::PAGE_SIZE as usize;

/// Why there is no such cache, or no registration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UcxError {
    /// The library is not there.
    #[error("UCX cannot be loaded: {why}; {HOW_TO_INSTALL}")]
    NotThere {
        /// What the loader said.
        why: String,
    },
    /// It is another version.
    #[error("this is UCX {found}, whose layouts are not known here; {HOW_TO_INSTALL}")]
    Version {
        /// What it says that it is.
        found: String,
    },
    /// Code would be patched while others run it.
    #[error("the process has {0} threads: load UCX before there are any others")]
    Threads(usize),
    /// It said no.
    #[error("{what} of {len} bytes at {addr:#x}: UCX says {status}")]
    Refused {
        /// The call.
        what: &'static str,
        /// Where.
        addr: usize,
        /// Bytes.
        len: usize,
        /// ucs_status_t.
        status: i8,
    },
}

/// What a registration is to whoever makes them.
pub trait Registrar: Send + Sync {
    /// Makes one of `[addr, addr + len)`, whole pages. `None`: it cannot be made.
    ///
    /// Called inside [`Rcache::get`], with locks of UCX held: it must not map or unmap memory that is registered.
    fn register(&self, addr: usize, len: usize) -> Option<u64>;

    /// Gives the one back that `register` returned. Called inside [`Rcache::get`], the drop of a [`Held`], of the
    /// [`Rcache`], or the unmapping system call.
    fn deregister(&self, token: u64);
}

#[repr(C)]
struct Region {
    start: usize,
    end: usize,
    lists: [[usize; 2]; 3],
    refcount: u32,
    /// status, prot, flags, lru_flags.
    small: [u8; 4],
    private: u64,
    /// Ours.
    token: u64,
}

#[repr(C)]
struct Ops {
    mem_reg: unsafe extern "C" fn(*mut c_void, *mut c_void, *mut c_void, *mut Region, u16) -> i8,
    mem_dereg: unsafe extern "C" fn(*mut c_void, *mut c_void, *mut Region),
    dump_region: unsafe extern "C" fn(*mut c_void, *mut c_void, *mut Region, *mut c_char, usize),
}

#[repr(C)]
struct Params {
    region_struct_size: usize,
    alignment: usize,
    max_alignment: usize,
    ucm_events: c_int,
    ucm_event_priority: c_int,
    ops: *const Ops,
    context: *mut c_void,
    flags: c_int,
    max_regions: c_ulong,
    max_size: usize,
    max_unreleased: usize,
}

// As gcc lays out the header's structures on x86-64.
const _: () = assert!(size_of::<Region>() == 80 + 8 && std::mem::offset_of!(Region, private) == 72);
const _: () = assert!(size_of::<Params>() == 80 && std::mem::offset_of!(Params, max_regions) == 56);

type Create = unsafe extern "C" fn(*const Params, *const c_char, *mut c_void, *mut *mut c_void) -> i8;
type Destroy = unsafe extern "C" fn(*mut c_void);
type Get = unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, *mut c_void, *mut *mut Region) -> i8;
type Put = unsafe extern "C" fn(*mut c_void, *mut Region);
type Version = unsafe extern "C" fn(*mut c_uint, *mut c_uint, *mut c_uint);

struct Functions {
    create: Create,
    destroy: Destroy,
    get: Get,
    put: Put,
}

impl Functions {
    fn load() -> Result<Functions, UcxError> {
        let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        if threads != 1 {
            return Err(UcxError::Threads(threads));
        }
        let library = Library::open(c"libucs.so.0")?;
        // Before any structure is shown to it.
        check_version(&Library::open(c"libucp.so.0")?)?;
        let symbol = |name| library.symbol(name);
        let (create, destroy) = (symbol(c"ucs_rcache_create")?, symbol(c"ucs_rcache_destroy")?);
        let (get, put) = (symbol(c"ucs_rcache_get")?, symbol(c"ucs_rcache_region_put")?);
        // SAFETY: these are the types that the header of this version declares.
        unsafe {
            Ok(Functions {
                create: std::mem::transmute::<*mut c_void, Create>(create),
                destroy: std::mem::transmute::<*mut c_void, Destroy>(destroy),
                get: std::mem::transmute::<*mut c_void, Get>(get),
                put: std::mem::transmute::<*mut c_void, Put>(put),
            })
        }
    }
}

/// A library that is never closed.
struct Library(NonNull<c_void>);

impl Library {
    fn open(name: &CStr) -> Result<Library, UcxError> {
        // SAFETY: the name ends with a NUL. The library's constructors may assume what the loader gives every library.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        NonNull::new(library).map(Library).ok_or_else(not_there)
    }

    fn symbol(&self, name: &CStr) -> Result<*mut c_void, UcxError> {
        // SAFETY: the library is loaded, and never closed.
        let found = unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) };
        if found.is_null() { Err(not_there()) } else { Ok(found) }
    }
}

/// The version is told by another library of the same package.
fn check_version(ucp: &Library) -> Result<(), UcxError> {
    let function = ucp.symbol(c"ucp_get_version")?;
    let (mut major, mut minor, mut release) = (0, 0, 0);
    // SAFETY: the type is part of UCP's stable API; it writes three numbers.
    unsafe {
        let version = std::mem::transmute::<*mut c_void, Version>(function);
        version(&raw mut major, &raw mut minor, &raw mut release);
    }
    if (major, minor) == (1, 13) {
        return Ok(());
    }
    Err(UcxError::Version { found: format!("{major}.{minor}.{release}") })
}

fn not_there() -> UcxError {
    UcxError::NotThere { why: last_error() }
}

fn last_error() -> String {
    // SAFETY: the string is ours to read until the next call of the loader by this thread.
    let error = unsafe { libc::dlerror() };
    if error.is_null() {
        return "the loader gives no reason".into();
    }
    // SAFETY: not null, so it is a string that ends with a NUL.
    unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned()
}

/// What UCX's callbacks are given.
struct Context<R> {
    registrar: R,
    registered: AtomicU64,
}

/// A cache of UCX's over `R`. Never more than the process can hold: it has no bounds of its own.
pub struct Rcache<R: Registrar> {
    functions: Functions,
    cache: NonNull<c_void>,
    /// Leaked and taken back by hand: UCX holds the same pointer.
    context: NonNull<Context<R>>,
}

// SAFETY: ucs_rcache is thread safe, and so is the registrar.
unsafe impl<R: Registrar> Send for Rcache<R> {}
// SAFETY: as above.
unsafe impl<R: Registrar> Sync for Rcache<R> {}

impl<R: Registrar> Rcache<R> {
    /// Loads UCX, patches this process, and makes a cache. Once a process, before there are other threads.
    ///
    /// # Errors
    /// [`UcxError`].
    pub fn create(registrar: R) -> Result<Rcache<R>, UcxError> {
        let functions = Functions::load()?;
        let context = Box::new(Context { registrar, registered: AtomicU64::new(0) });
        let context = NonNull::from(Box::leak(context));
        // UCX keeps the pointer for the life of the cache.
        let ops: &'static Ops =
            const { &Ops { mem_reg: mem_reg::<R>, mem_dereg: mem_dereg::<R>, dump_region } };
        let params = Params {
            region_struct_size: size_of::<Region>(),
            alignment: PAGE,
            max_alignment: PAGE,
            ucm_events: UCM_EVENT_VM_UNMAPPED,
            ucm_event_priority: 1000,
            ops,
            context: context.as_ptr().cast(),
            flags: 0,
            max_regions: c_ulong::MAX,
            max_size: usize::MAX,
            max_unreleased: usize::MAX,
        };
        let mut cache = null_mut();
        // SAFETY: the layouts are the library's (checked by version), and what it keeps lives until the cache is destroyed.
        let status =
            unsafe { (functions.create)(&raw const params, c"userptr".as_ptr(), null_mut(), &raw mut cache) };
        match NonNull::new(cache) {
            Some(cache) if status == OK => Ok(Rcache { functions, cache, context }),
            _ => {
                // SAFETY: leaked above, and UCX made no cache that could hold it.
                drop(unsafe { Box::from_raw(context.as_ptr()) });
                Err(UcxError::Refused { what: "ucs_rcache_create", addr: 0, len: 0, status })
            }
        }
    }

    /// A registration of `[addr, addr + len)`, from the cache or new.
    ///
    /// # Errors
    /// [`UcxError::Refused`], if the registrar made none.
    #[inline]
    pub fn get(&self, addr: usize, len: usize) -> Result<Held<'_, R>, UcxError> {
        let (mut fresh, mut region) = (false, null_mut());
        // SAFETY: UCX reads no memory at the address; the two variables live through the call, which is all that it and
        // the registrar keep them for.
        let status = unsafe {
            (self.functions.get)(
                self.cache.as_ptr(),
                std::ptr::without_provenance_mut(addr),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                (&raw mut fresh).cast(),
                &raw mut region,
            )
        };
        match NonNull::new(region) {
            Some(region) if status == OK => Ok(Held { cache: self, region, fresh }),
            _ => Err(UcxError::Refused { what: "ucs_rcache_get", addr, len, status }),
        }
    }

    /// Registrations made so far.
    pub fn registered(&self) -> u64 {
        self.context().registered.load(Ordering::Relaxed)
    }

    /// Whoever makes the registrations.
    pub fn registrar(&self) -> &R {
        &self.context().registrar
    }

    fn context(&self) -> &Context<R> {
        // SAFETY: it lives as long as the cache, and nobody has it mutably.
        unsafe { self.context.as_ref() }
    }
}

impl<R: Registrar> Drop for Rcache<R> {
    fn drop(&mut self) {
        // SAFETY: leases borrow the cache, so none is left; the callbacks come no more after it, and then the context is
        // only ours.
        unsafe {
            (self.functions.destroy)(self.cache.as_ptr());
            drop(Box::from_raw(self.context.as_ptr()));
        }
    }
}

/// A registration that is held.
pub struct Held<'c, R: Registrar> {
    cache: &'c Rcache<R>,
    region: NonNull<Region>,
    fresh: bool,
}

impl<R: Registrar> Held<'_, R> {
    /// Was it made for this call, rather than found?
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// What [`Registrar::register`] returned.
    pub fn token(&self) -> u64 {
        // SAFETY: the region is held. Only this field is read, which nobody writes after the registration was made.
        unsafe { (&raw const (*self.region.as_ptr()).token).read() }
    }
}

impl<R: Registrar> Drop for Held<'_, R> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: got from this cache, and put once.
        unsafe { (self.cache.functions.put)(self.cache.cache.as_ptr(), self.region.as_ptr()) };
    }
}

unsafe extern "C" fn mem_reg<R: Registrar>(
    context: *mut c_void,
    _: *mut c_void,
    fresh: *mut c_void,
    region: *mut Region,
    _: u16,
) -> i8 {
    // SAFETY: the context of `create`, which UCX gives to all callbacks of the cache.
    let context = unsafe { &*context.cast::<Context<R>>() };
    // SAFETY: UCX shows a region that nobody else has yet; these two fields are set.
    let (start, end) = unsafe { ((*region).start, (*region).end) };
    let Some(token) = context.registrar.register(start, end - start) else { return IO_ERROR };
    context.registered.fetch_add(1, Ordering::Relaxed);
    // SAFETY: as above; the region has room for the token, by `region_struct_size`.
    unsafe { (&raw mut (*region).token).write(token) };
    // SAFETY: the argument of `get`, whose variable lives while it waits for this.
    unsafe { fresh.cast::<bool>().write(true) };
    OK
}

unsafe extern "C" fn mem_dereg<R: Registrar>(context: *mut c_void, _: *mut c_void, region: *mut Region) {
    // SAFETY: as in `mem_reg`.
    let context = unsafe { &*context.cast::<Context<R>>() };
    // SAFETY: UCX gives up a region of this cache, whose token was set when it was registered.
    context.registrar.deregister(unsafe { (*region).token });
}

unsafe extern "C" fn dump_region(
    _: *mut c_void,
    _: *mut c_void,
    _: *mut Region,
    text: *mut c_char,
    room: usize,
) {
    if room > 0 && !text.is_null() {
        // SAFETY: there is room for the empty string.
        unsafe { text.write(0) };
    }
}
