// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a primary MMU refuses: the errors of [`PrimaryMmu`](super::PrimaryMmu) and
//! [`Subscription`](super::Subscription), the same for every source. Each names the range or page, and what to do
//! about it where something can be done.

use std::error::Error;

use crate::{Access, InsideInvalidation, PageAddr, Range};

/// Why a subscription has no sequence to give.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Gone {
    /// This process is a fork child: the subscription hears the parent's memory.
    #[error("the subscription belongs to the parent process: subscribe again in this one")]
    Forked,
    /// The source stopped working and can no longer vouch for anything.
    #[error("the source is closed ({why}): open a new one and subscribe again")]
    Closed {
        /// What happened.
        why: String,
    },
    /// The address space is gone.
    #[error("the address space has been released")]
    Released,
    /// The caller waits for itself.
    #[error(transparent)]
    InsideInvalidation(#[from] InsideInvalidation),
}

/// An error of a source that has no name here.
pub type SourceError = Box<dyn Error + Send + Sync>;

/// Why a range cannot be subscribed to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The address space is being torn down, or is gone.
    #[error("cannot subscribe to {0}: the address space has been released")]
    Released(Range),
    /// The source works on memory of another kind.
    #[error("cannot subscribe to {range}: {why}")]
    Unsupported {
        /// The range asked for.
        range: Range,
        /// What it is that the source cannot hear, and which source could.
        why: String,
    },
    /// The source has no privilege for it.
    #[error("cannot subscribe to {range}: {missing} is missing")]
    NotPermitted {
        /// The range asked for.
        range: Range,
        /// The capability, group or setting, and how to get it.
        missing: String,
    },
    /// The system refused.
    #[error("cannot subscribe to {range}: {source}")]
    Source {
        /// The range asked for.
        range: Range,
        /// What it said.
        source: SourceError,
    },
}

/// Why pages could not be got.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GupError {
    /// Nothing is mapped there (EFAULT).
    #[error("cannot get the pages of {range} for {access:?}: nothing is mapped at {at:?}")]
    NotMapped {
        /// The range asked for.
        range: Range,
        /// The access asked for.
        access: Access,
        /// The first page that failed.
        at: PageAddr,
    },
    /// The mapping does not allow the access (EFAULT).
    #[error("cannot get the pages of {range} for {access:?}: the mapping at {at:?} does not allow it")]
    AccessDenied {
        /// The range asked for.
        range: Range,
        /// The access asked for.
        access: Access,
        /// The first page that failed.
        at: PageAddr,
    },
    /// No memory, or a limit such as RLIMIT_MEMLOCK.
    #[error("cannot get the pages of {range}: {limit} is exhausted")]
    NoMemory {
        /// The range asked for.
        range: Range,
        /// Which resource.
        limit: String,
    },
    /// The address space is gone.
    #[error("cannot get the pages of {0}: the address space has been released")]
    Released(Range),
    /// The source cannot do it.
    #[error("cannot get the pages of {range}: {why}")]
    Unsupported {
        /// The range asked for.
        range: Range,
        /// What is missing, and how to get it.
        why: String,
    },
    /// The system refused.
    #[error("cannot get the pages of {range}: {source}")]
    Source {
        /// The range asked for.
        range: Range,
        /// What it said.
        source: SourceError,
    },
}

/// Why the identity of a page is not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The source has no privilege for it.
    #[error("cannot tell the page at {page:?}: {missing} is missing")]
    NotPermitted {
        /// The page asked for.
        page: PageAddr,
        /// The capability or setting, and how to get it.
        missing: String,
    },
    /// The address space is gone.
    #[error("cannot tell the page at {0:?}: the address space has been released")]
    Released(PageAddr),
    /// The system refused.
    #[error("cannot tell the page at {page:?}: {source}")]
    Source {
        /// The page asked for.
        page: PageAddr,
        /// What it said.
        source: SourceError,
    },
}
