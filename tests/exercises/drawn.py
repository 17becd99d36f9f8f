"""What the suite draws anew for every hand-in."""
import random

import torch


class Drawn:
    """Tokens in a plane and how frequent they are, and times: another world for every seed."""

    def __init__(self, seed, more=0):
        self.chance = random.Random(seed + more)
        self.V = self.chance.randint(4, 6) + 3 * more
        cells = self.chance.sample(range(16), self.V)           # no two at the same place
        self.places = torch.tensor([[i // 4 + 0.5 * self.chance.random(),
                                     i % 4 + 0.5 * self.chance.random()] for i in cells])
        self.frequency = torch.tensor([self.chance.randint(2, 40) for _ in range(self.V)])

    def times(self, n, least=0.02, most=0.98):
        """n times, one in each n-th of this range."""
        width = (most - least) / n
        return [least + width * (i + self.chance.random()) for i in range(n)]

    def tokens(self, n):
        return self.chance.sample(range(self.V), min(n, self.V))
