"""The images of a batch, each at its own place of the grid: a pass of several cells takes some further than others."""

import torch.nn.functional as F

from .loop import SamplingLoop


SHARE_THAT_LEAVES = 0.25
"""Complete images leave when they are at least so many of those in a pass: it copies the cache of the others."""


class OwnPace:
    """Passes over cells of which the first codes so far are guesses, and how far each image has come by them.

    Args:
        loop: which has taken what decides the codes (`start`).
    """

    def __init__(self, loop: SamplingLoop):
        self.loop = loop
        self.places = [0] * len(loop.codes_BLD)
        """Of each image, the first cell that is not final."""
        self.images = list(range(len(loop.codes_BLD)))
        """Those of which passes are made."""

    def step(self, cell: int, count: int, end: int) -> int:
        """Samples `count` cells of each image from its place on, the last ones before `end` where fewer are left.

        A cell is final where the guesses of all cells before it were right, as those of final codes are. Where a pass
        has changed a code, that one is the last.

        Args:
            cell: the first that is not final in all images.
            end: where images wait for the others, at most the end of the grid.

        Returns:
            What `cell` is then.
        """
        loop = self.loop
        places = [max(cell, self.places[image]) for image in self.images]
        starts = [min(place, end - count) for place in places]
        together = len(self.images) == len(self.places) and {*places, *starts} == {cell}
        if together and count == 1:
            loop.step(cell)
            self.places = [cell + 1] * len(self.places)
            return cell + 1
        guesses_BLD = loop.codes_BLD.clone()
        if together:
            loop.step(cell, count)
        else:
            loop.step_apart(self.images, starts, places, count=count)
        changed_BL = (loop.codes_BLD != guesses_BLD).any(2)
        changes = F.pad(changed_BL, (0, 1), value=True).byte().argmax(1).tolist()  # the first of each image
        for image, start in zip(self.images, starts):
            self.places[image] = min(changes[image] + 1, start + count)
        final = min(self.places[: loop.images])
        alike = 0 if loop.runner.together else loop.images  # what is over of the batch follows the others
        self.places[alike:] = [final] * len(self.places[alike:])
        loop.unread, loop.guessed = final, True
        self.let_complete_ones_leave()
        return final

    def let_complete_ones_leave(self) -> None:
        """Makes the next passes without images that are complete, where these are many."""
        length = self.loop.codes_BLD.shape[1]
        stay = [row for row, image in enumerate(self.images) if self.places[image] < length]
        complete = len(self.images) - len(stay)
        if stay and complete >= SHARE_THAT_LEAVES * len(self.images) and not self.loop.fixed_shapes:
            self.loop.leave(stay)
            self.images = [self.images[row] for row in stay]
