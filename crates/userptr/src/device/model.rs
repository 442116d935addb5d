// SPDX-License-Identifier: MIT OR Apache-2.0
//! Engines that are models: what a checker puts in the place of hardware, written in safe code.
//!
//! A model gets device addresses, which are numbers to it, and works on the pages that its primary MMU has given it: the
//! frames of a software mm. It has no way to the program's own memory, so nobody has to promise anything about that.

use interleave::MaySleep;

use super::{Command, Engine, Fence, SubmitError};

/// What executes batches in a model. Its [`Engine`] is this.
pub trait Model: Send + Sync {
    /// What tells that a batch is done.
    type Fence: Fence;

    /// Takes a batch; see [`Engine::submit`].
    ///
    /// # Errors
    /// [`SubmitError`]; nothing is executed then.
    fn submit(&self, cx: &mut MaySleep<'_>, batch: &[Command]) -> Result<Self::Fence, SubmitError>;
}

// SAFETY: safe code that is handed integers accesses no memory of the program through them, neither what they name nor
// anything else.
unsafe impl<T: Model> Engine for T {
    type Fence = T::Fence;

    unsafe fn submit(&self, cx: &mut MaySleep<'_>, batch: &[Command]) -> Result<Self::Fence, SubmitError> {
        Model::submit(self, cx, batch)
    }
}
