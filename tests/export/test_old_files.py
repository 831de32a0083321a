"""Packed files of releases that kept no grids."""

from __future__ import annotations

import base64
import hashlib
import zlib
from pathlib import Path

import pytest
import torch

from parq_fn.export import Packed, load, save

#: Written by commit 29a76d9: asymmetric(2), lsbq(2), a plain tensor, lsbq(1), uniform(2, "max").
ONE = (
    b"c-ozl&ubGw6vuNAa_}sIl~M*I5eD5Kvztwzokg%0FS!JiZdj(fv+d&kNOw2Y7`GP0izh*-7Y{Zd`d4J@!Bag*K<P=mOa"
    b"B88&Q4;xLN-DN2HyO5pZA^j-h8}N;bRC))29isNkU8$w1%KZq8-x-Knn~F5D=fn254;<fW!lz-Hcqz0MGzVL@75S8YkR"
    b"{-K`+zRzGl^F!Bx1Ws4rM9#WezhW|41^;SfJzDFWA8L$m@mqw<wO@e@W^_v{E(<edVKA{mmKliUo)AM+n^k^;+L9Lsf="
    b"_-RKG>F4!F58PYcS@<Vw_Ow~mSE2kb&+Juoa+)?i7n#M)tXNp*XBh^r#q6Oaz|Ti3KVHtLv{#tnyO<r8kUM0NTF;fM3z"
    b"NaM3zMzrQuM;)|$u?EQejSkY*#5N7$uN?1ljYiYZ88p)|Lw(57+TO1!B;$BAje)*GTEKvB}V5ZK9}M_Gq;Gytbs*>Rqd"
    b"BF3Y;)SJgqRHzjxch*I<z(Ek@q`VOpNYS7us|%%YK&c4!l%o5(EEW94sf7G%%nPnUq?P*e*u3A$)yparkx-@{ofAssBM"
    b"mBx^h-Ho)?wv35X%BuT+qLaQY9Lzge3f@oN4#bhwSp?^O(&wX5$x2ud<i>ue0y>_Q%~DKgL(?KETgwBKE%=jz5{zqo2R"
    b"-XKdn1<thG+SM?75hFA2CUa7pnSM^Q3jlbgSdRwm^p$y@wKFUtUCu<{onk{F`_!J*!)vSt-@%!7Oy~D`?ZZD1Y-c1gk3"
    b"F+HG=Nh-eKWzHO8v"
)
#: Likewise, of version 2: uniform(2) by per_channel(1) in channels_last, max_uniform(2) by blocks.
TWO = (
    b"c-noE&x_MQ6vvC=U*OG)Wlj|aNzzH0b}8MHc=fO+Q{p6<?3SiUH%XVSrHe=Z0*|GX-IMoK53+mk>cxXp1d#;~WkK*KiU"
    b"__pb=?VUO%HkB@4WY&PiFe`Qb|4|;<`PN^ML2vbxC7H`aIos!<aP4$RRQBiOeC5yAJ7!G!~IVs6%>u=#VxPeeQQf0PCa"
    b"kb*%kCzAX5#gX8)bnm1D(4<ep+@?EfCSfsAM#bcPNU|&<eA=9@9JkC4!MJl@naVJdDUd320W?Q^35XhkTW9{)7PjTNUi"
    b"8rCta0IfTG*&TqQQ~(i1})2>rgjkp?BK2<VbpGq$4kdBE!l7S^}yu5?g>#9L7mk!X6m}|LT2#L4}{G)<AyK;%V4JPOy+"
    b"wvlbe2^*KJ+bJh{V;NV857OLj7*e^2<Pp9CVqo04~ygkdJ~3^_E7GR<yN66Cvm0T;Mo6T0MtWq|w_5s4iUU6fI^8DwZm"
    b"#x31aLY60v$MGKwn=;*8g;6`3U&)|Rpil`crp)UWt-^7`Uw7KS{Q0PK{-AEb`@zKes`{wWe}6rEt@^0ZpFV!^wvYo_`m"
    b"@Su!3T~0z4YZ5)klr~@tt>{R3A0^<sYY|W5q|k4)68h{x`KBwaj@)eid>+%kL_Ylfrj_mYm&SQQ!oPerewLuKK8@Kjl9"
    b"QK4_VL_4da?K4{6aIQU)Q0o|G(tvy?-&s&GjCr>7|!{)}d+1~WkqhwZIygB)B<qr!mNz?"
)
#: By name what its weight's bytes, in logical order, hash to (SHA-256, the first 16 digits), as the
#: commit that wrote them gave it.
WEIGHTS = {
    "asymmetric": "99bdde5c4327d171",
    "free": "ecb90262bdf901c8",
    "rest": "7bb330b90c6bdf68",
    "signs": "0ba7653754f7b9cc",
    "uniform": "8e09674ab24f9dbd",
    "kernel": "2a6d2dbddd6ede93",
    "max": "bacf2b3b972fd6a0",
}


@pytest.mark.parametrize("file", [ONE, TWO], ids=["version 1", "version 2"])
def test_files_without_grids_are_read_and_written_as_they_were(file: bytes, tmp_path: Path) -> None:
    data = zlib.decompress(base64.b85decode(file))
    (tmp_path / "old").write_bytes(data)
    packed = load(tmp_path / "old")
    assert packed
    for name, entry in packed.items():
        weight = entry.unpack() if isinstance(entry, Packed) else entry
        digest = hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes())
        assert digest.hexdigest()[:16] == WEIGHTS[name], name
        if isinstance(entry, Packed):
            assert entry.grid is None
            if entry.levels.dtype in (torch.float32, torch.float64):  # which nothing rounded
                assert (entry.even is None) == (name == "free"), name
    save(packed, tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == data
