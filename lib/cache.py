"""Keys and values of the responses that are being generated, in places that they leave at any time."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SPARE = 128  # columns beyond those in use when a window is made: it moves after that many tokens


def make_cache(model):
    """An empty Window, or Grown for a model that keeps more than each token's keys and values (such as Mamba's)."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return Window(model) if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else Grown()


class Window:
    """Row r of the batch is place r of each layer's buffers [places, heads, columns, head size]. The next token of each
    row goes to column `end`:

        place 0    . . . a a a a a a |        Columns first to end are in use. What is left of a row's first token is
        place 1    b b b b b b b b b |        padding, as in any batch that is padded on the left. A row that joins
        place 2    . . . . . c c c c |        ends where all end. When the longest row leaves, `first` moves right, and
                 first             end        when the buffer ends, the columns in use move back to its start.
    """

    joins = True  # rows may join while others are in progress

    def __init__(self, model):
        self.starts, self.first, self.end = [], 0, 0  # starts: the column of each row's first token
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [InPlace(self) for _ in self.cache.layers]

    def add(self, prefilled, which, lengths):
        """Adds rows. prefilled: a DynamicCache of prompts, padded on the left; which[i]: its row that new row i copies;
        lengths[i]: the row's tokens."""
        self.make_room(prefilled, max(lengths), len(lengths))
        rows = slice(len(self.starts), len(self.starts) + len(lengths))
        for layer, more in zip(self.cache.layers, prefilled.layers):
            if more.keys is None:  # a layer that reads another's
                continue
            width = more.keys.shape[2]  # of a layer with a sliding window: its last columns alone
            for buffer, some in (layer.keys, more.keys), (layer.values, more.values):
                buffer[rows, :, self.end - width:self.end] = some[which]
        self.starts += [self.end - length for length in lengths]
        self.first = min(self.starts)

    def make_room(self, like=None, longest=0, count=0):
        """Makes room for `count` more rows of `longest` tokens, and then for one token more of every row: moves the
        columns in use to the start of the buffers, which grow if they must. like: a cache with their heads, head
        size and dtype."""
        rows, width = len(self.starts), self.end - self.first
        places, columns = next((layer.keys.shape[::2] for layer in self.cache.layers if layer.keys is not None), (0, 0))
        if rows + count <= places and longest <= self.end < columns:
            return
        end = max(width, longest)
        shape = max(places, rows + count), max(columns, end + SPARE)
        for layer, more in zip(self.cache.layers, (like or self.cache).layers):
            if more.keys is not None:
                layer.move(more, shape, rows, slice(self.first, self.end), slice(end - width, end))
        self.starts = [start + end - self.end for start in self.starts]
        self.first, self.end = end - width, end

    def keep(self, rows):
        """Keeps these rows alone, which ascend -> the same rows in their new order: the last ones fill the places of
        those that leave."""
        order = list(range(len(rows)))
        holes, movers = sorted({*order} - {*rows}), [row for row in rows if row >= len(rows)]
        for hole, mover in zip(holes, movers):
            order[hole] = mover
        if movers:
            used = slice(self.first, self.end)
            for buffer in (buffer for layer in self.cache.layers for buffer in (layer.keys, layer.values)):
                if buffer is not None:
                    buffer[holes, :, used] = buffer[movers, :, used]
        self.starts = [self.starts[row] for row in order]
        self.first = min(self.starts, default=self.end)
        return order


class InPlace(DynamicLayer):
    """A layer of a Window. Where attention slides it keeps all columns, too: the mask hides those that are too far."""

    def __init__(self, window):
        super().__init__()
        self.window = window

    def move(self, like, shape, rows, source, target):
        """The first `rows` places of the columns `source` go to the columns `target` of buffers [places, heads,
        columns, head size]. Zeros are elsewhere: NaN times a weight of 0 would be NaN."""
        for name, some in ("keys", like.keys), ("values", like.values):
            old = getattr(self, name)
            buffer = old
            if old is None or old.shape[::2] != shape:  # keys come in fp32 from rotary positions; attention rounds them
                buffer = like.values.new_zeros(shape[0], some.shape[1], shape[1], some.shape[3])
            if rows:
                buffer[:rows, :, target] = old[:rows, :, source].clone()
            setattr(self, name, buffer)

    def update(self, keys, values, *args, **kwargs):
        """Writes the next token's keys and values [rows, heads, 1, head size] -> those of all columns in use."""
        rows, end, used = len(keys), self.window.end, slice(self.window.first, self.window.end + 1)
        self.keys[:rows, :, end], self.values[:rows, :, end] = keys[:, :, 0], values[:, :, 0]
        return self.keys[:rows, :, used], self.values[:rows, :, used]

    def get_seq_length(self):
        return self.window.end - self.window.first


class Grown:
    """The same interface over transformers' own cache: rows leave it at any time, but join only when it is empty."""

    joins = False

    def __init__(self):
        self.starts, self.first, self.end = [], 0, 0

    def add(self, prefilled, which, lengths):
        prefilled.reorder_cache(which)
        self.cache, self.end = prefilled, max(lengths)
        self.starts = [self.end - length for length in lengths]

    def make_room(self):
        """It grows by itself."""

    def keep(self, rows):
        if rows:
            self.cache.reorder_cache(torch.tensor(rows))
        self.starts = [self.starts[row] for row in rows]
        return rows
