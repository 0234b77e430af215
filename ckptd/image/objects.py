"""Everything of a state that is not a tensor, as JSON with tagged types.

`encode` and `decode` are inverse: decode(encode(tree)) equals `tree` in value and
in type, down to the sign of zero and the bits of a NaN.  What has no safe form is
refused with its path; nothing is pickled, and nothing silently becomes something
else (three exceptions, all harmless: a `torch.Size` comes back as a tuple, a numpy
array comes back in C order and owning its bytes, and one object reached on two ways
comes back as two equal ones).

The text is `{"ckptd.objects":1,"tree":VALUE}`, ASCII, without white space.  A VALUE is
null, true, false, a string, a finite number (integers of any size below 2**1024 in
magnitude), an array (a list), an object without the key "$" (a dict with str keys),
or an object with the key "$", which says what it is:

    {"$":"float","v":HEX}       Inf, -Inf, NaN: 8 bytes, big-endian, as 16 hex digits
    {"$":"int","v":HEX}         an integer from 2**1024 on: "-0x1f..."
    {"$":"str","v":B64}         a string with lone surrogates: UTF-8 with surrogates
    {"$":"bytes","v":B64}       also "bytearray"
    {"$":"complex","v":HEX}     real and imaginary part, 8 bytes each as for a float
    {"$":"tuple","v":[...]}     also "set" and "frozenset", in the order of the elements' texts
    {"$":"deque","v":[...],"n":MAXLEN or null}
    {"$":"dict","v":[[K,V],...]}  dicts with other keys, or with the key "$"; also
                                "OrderedDict" and "Counter"
    {"$":"defaultdict","v":[[K,V],...],"f":FACTORY or null}
    {"$":"array","d":DTYPE,"s":[...],"v":B64}   numpy, C order, DTYPE as in numpy.dtype.str
    {"$":"scalar","d":DTYPE,"v":B64}            numpy
    {"$":"tensor","v":NAME}     a `TensorRef`

B64 is base64 with padding.  A reader refuses every other tag and key, and keys given twice.
"""

from __future__ import annotations

from ckptd.image.decoding import decode
from ckptd.image.encoding import encode
from ckptd.image.tags import TensorRef

__all__ = ["TensorRef", "decode", "encode"]
