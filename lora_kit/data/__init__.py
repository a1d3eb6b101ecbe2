"""From what people have to what a step trains on: records -> examples -> tokens -> micro-batches.

sources, files      records by number, each with its place (file and line)
formats, messages   a record to one Example
rendering           a chat template's text, and where the answers stand in it
template            text to token ids and loss mask
tokens              all examples as flat arrays, with every problem reported at once
vocabulary          do tokenizer, data and base fit together
order, packing      which examples a step trains on, and how they become micro-batches
"""
