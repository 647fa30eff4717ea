"""One loop trains N adapters on the base that serves.

Words of this package:

unit       one adapter being trained: its weights, optimizer, schedule and data
item       what one row of data teaches, never divided: an example, or a pair of a preference
window     the items of one update; its micro-batches may take several forwards
pass       one turn of the loop: the next micro-batch of every unit, in one or more forwards
share      what one process computes of a window, where several processes train together
signal     loss, accuracy and margin of some items, as sums or as means
slot       the number of a unit in one forward, by which its rows find its weights
replica    which visit to a base layer, where a unit's layer map visits it several times
start      fixed first factors A₀, B₀ of an init such as PiSSA; training moves away from them
sweep      a unit that stands for several members with other settings
rung       a number of updates after which the worse half of a sweep's members stops
held out   data that is never trained on; its loss chooses the best weights
"""
