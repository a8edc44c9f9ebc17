"""One process of several, as torchrun starts it, with a fault in one: RANK=… python tests/ranked.py FAULT key=value …

none    nothing is wrong
nan     the loss of the second process is not a number in its third step
unused  the head has a parameter that nothing depends on
broken  the second process fails in its third step with an error of its own
Each writes the sum of its weights after every step to weights<RANK>.txt.
"""

import functools
import os
import sys

import torch

from img2prompt.commands.door import main
from img2prompt.heads import Linear
from img2prompt.losses import Cosine
from img2prompt.training.module import RegressorModule

if __name__ == "__main__":
    fault, rank = sys.argv[1], os.environ["RANK"]
    forward, step, calls = Cosine.forward, RegressorModule.optimizer_step, [-1]  # one call looks for unused parameters

    def faulty(self, outputs, batch):
        losses = forward(self, outputs, batch)
        calls[0] += 1
        if rank == "1" and calls[0] == 3 and fault == "broken":
            raise ValueError("no disk was found under the sea")
        is_bad = rank == "1" and calls[0] == 3 and fault == "nan"
        return {name: value * float("nan") if is_bad else value for name, value in losses.items()}

    def told(self, *args):
        step(self, *args)
        with open(f"weights{rank}.txt", "a") as file:
            print(*(f"{float(weight.double().sum()):.17g}" for weight in self.parameters()), file=file)

    if fault == "unused":
        init = Linear.__init__

        # Whoever builds it reads the names of its arguments.
        @functools.wraps(init)
        def larger(self, *args, **options):
            init(self, *args, **options)
            self.spare = torch.nn.Parameter(torch.zeros(3))

        Linear.__init__ = larger
    Cosine.forward, RegressorModule.optimizer_step = faulty, told
    main("train", sys.argv[2:])
