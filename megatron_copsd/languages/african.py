"""The African languages: data only.

No text here comes from another project. ``checked`` says whether a speaker of the language has read the texts of a
row; a row that nobody has checked is used as it stands, and its ``caveat`` is shown to the user.
"""

from __future__ import annotations

from megatron_copsd.languages.entry import Language

AFRICAN: tuple[Language, ...] = (
    Language(
        code="AMH",
        name="Amharic",
        native_name="አማርኛ",
        script="Ethi",
        aliases=("am", "amh_Ethi"),
        problem_label="ጥያቄ",
        solution_label="መፍትሔ",
        instruction="በአማርኛ ደረጃ በደረጃ አስብ፣ የመጨረሻውን መልስ በ \\boxed{} ውስጥ ጻፍ።",
        think_prefix="ይህን ጥያቄ በአማርኛ ደረጃ በደረጃ እፈታለሁ።",
        transition="በእንግሊዝኛ የተጻፈውን መፍትሔ አንብበሃል። አሁን ጥያቄውን በራስህ ቃላት በአማርኛ ደረጃ በደረጃ ፍታ።",
    ),
    Language(
        code="EWE",
        name="Ewe",
        native_name="Eʋegbe",
        script="Latn",
        aliases=("ee", "ewe_Latn"),
        problem_label="Nyabiase",
        solution_label="Ŋuɖoɖo",
        instruction="Bu tame afɔɖeɖe ɖeka ɖeka le Eʋegbe me, eye nàŋlɔ ŋuɖoɖo mamlɛa ɖe \\boxed{} me.",
        think_prefix="Maɖo nyabiase sia ŋu afɔɖeɖe ɖeka ɖeka le Eʋegbe me.",
        transition="Èxlẽ ŋuɖoɖo si woŋlɔ ɖe Iŋlisigbe me. Azɔ ɖo nyabiasea ŋu le wò ŋutɔ wò nyawo me le Eʋegbe me, "
        "afɔɖeɖe ɖeka ɖeka.",
    ),
    Language(
        code="HAU",
        name="Hausa",
        native_name="Hausa",
        script="Latn",
        aliases=("ha", "hau_Latn"),
        problem_label="Tambaya",
        solution_label="Mafita",
        instruction="Ka yi tunani mataki-mataki da Hausa, sannan ka rubuta amsar ƙarshe a cikin \\boxed{}.",
        think_prefix="Zan warware wannan tambaya mataki-mataki da Hausa.",
        transition="Ka karanta mafitar da aka rubuta da Turanci. Yanzu ka warware tambayar da kalmominka da Hausa, "
        "mataki-mataki.",
    ),
    Language(
        code="IBO",
        name="Igbo",
        native_name="Igbo",
        script="Latn",
        aliases=("ig", "ibo_Latn"),
        problem_label="Ajụjụ",
        solution_label="Ngwọta",
        instruction="Chee echiche nzọụkwụ site na nzọụkwụ n'asụsụ Igbo, dee azịza ikpeazụ n'ime \\boxed{}.",
        think_prefix="Aga m edozi ajụjụ a nzọụkwụ site na nzọụkwụ n'asụsụ Igbo.",
        transition="Ị gụọla ngwọta e dere n'asụsụ Bekee. Ugbu a, jiri okwu nke gị dozie ajụjụ a n'asụsụ Igbo, nzọụkwụ "
        "site na nzọụkwụ.",
    ),
    Language(
        code="KIN",
        name="Kinyarwanda",
        native_name="Ikinyarwanda",
        script="Latn",
        aliases=("rw", "kin_Latn"),
        problem_label="Ikibazo",
        solution_label="Igisubizo",
        instruction="Tekereza intambwe ku yindi mu Kinyarwanda, hanyuma wandike igisubizo cya nyuma muri \\boxed{}.",
        think_prefix="Ngiye gukemura iki kibazo intambwe ku yindi mu Kinyarwanda.",
        transition="Wasomye igisubizo cyanditse mu Cyongereza. Noneho kemura iki kibazo mu magambo yawe bwite mu "
        "Kinyarwanda, intambwe ku yindi.",
    ),
    Language(
        code="LIN",
        name="Lingala",
        native_name="Lingála",
        script="Latn",
        aliases=("ln", "lin_Latn"),
        problem_label="Motuna",
        solution_label="Eyano",
        instruction="Kanisa etambe na etambe na Lingala, mpe koma eyano ya nsuka na kati ya \\boxed{}.",
        think_prefix="Nakozongisa eyano na motuna oyo etambe na etambe na Lingala.",
        transition="Otangi eyano oyo bakomi na Lingelesi. Sikoyo zongisa eyano na motuna oyo na maloba na yo moko na "
        "Lingala, etambe na etambe.",
    ),
    Language(
        code="LUG",
        name="Luganda",
        native_name="Luganda",
        script="Latn",
        aliases=("lg", "lug_Latn"),
        problem_label="Ekibuuzo",
        solution_label="Eky'okuddamu",
        instruction="Lowooza mutendera ku mutendera mu Luganda, owandiike eky'okuddamu ekisembayo mu \\boxed{}.",
        think_prefix="Ŋŋenda kugonjoola ekibuuzo kino mutendera ku mutendera mu Luganda.",
        transition="Osomye eky'okuddamu ekiri mu Lungereza. Kati gonjoola ekibuuzo kino mu bigambo byo mu Luganda, "
        "mutendera ku mutendera.",
    ),
    Language(
        code="ORM",
        name="Oromo",
        native_name="Afaan Oromoo",
        script="Latn",
        aliases=("om", "gaz", "gaz_Latn"),
        problem_label="Gaaffii",
        solution_label="Furmaata",
        instruction="Afaan Oromootiin tarkaanfii tarkaanfiin yaadi, deebii isa dhumaa \\boxed{} keessatti barreessi.",
        think_prefix="Gaaffii kana Afaan Oromootiin tarkaanfii tarkaanfiin nan fura.",
        transition="Furmaata Afaan Ingiliziitiin barreeffame dubbisteetta. Amma gaaffii kana jechoota mataa keetiin "
        "Afaan Oromootiin tarkaanfii tarkaanfiin furi.",
    ),
    Language(
        code="SNA",
        name="Shona",
        native_name="chiShona",
        script="Latn",
        aliases=("sn", "sna_Latn"),
        problem_label="Mubvunzo",
        solution_label="Mhinduro",
        instruction="Funga nhanho nenhanho muchiShona, wonyora mhinduro yekupedzisira mukati me \\boxed{}.",
        think_prefix="Ndichagadzirisa mubvunzo uyu nhanho nenhanho muchiShona.",
        transition="Waverenga mhinduro yakanyorwa muChirungu. Zvino gadzirisa mubvunzo uyu nemashoko ako muchiShona, "
        "nhanho nenhanho.",
    ),
    Language(
        code="SOT",
        name="Southern Sotho",
        native_name="Sesotho",
        script="Latn",
        aliases=("st", "sot_Latn", "Sesotho"),
        problem_label="Potso",
        solution_label="Tharollo",
        instruction="Nahana mohato ka mohato ka Sesotho, mme o ngole karabo ya ho qetela ka hare ho \\boxed{}.",
        think_prefix="Ke tla rarolla potso ena mohato ka mohato ka Sesotho.",
        transition="O badile tharollo e ngotsweng ka Senyesemane. Jwale rarolla potso ena ka mantswe a hao ka Sesotho, "
        "mohato ka mohato.",
    ),
    Language(
        code="SWA",
        name="Swahili",
        native_name="Kiswahili",
        script="Latn",
        aliases=("SW", "swh", "swh_Latn"),
        problem_label="Swali",
        solution_label="Suluhisho",
        instruction="Fikiri hatua kwa hatua kwa Kiswahili, kisha andika jibu la mwisho ndani ya \\boxed{}.",
        think_prefix="Nitatatua swali hili hatua kwa hatua kwa Kiswahili.",
        transition="Umesoma suluhisho lililoandikwa kwa Kiingereza. Sasa tatua swali hili kwa maneno yako mwenyewe kwa "
        "Kiswahili, hatua kwa hatua.",
    ),
    Language(
        code="TWI",
        name="Twi",
        native_name="Twi",
        script="Latn",
        aliases=("tw", "twi_Latn"),
        problem_label="Asɛmmisa",
        solution_label="Mmuaeɛ",
        instruction="Dwene ho anamɔn anamɔn wɔ Twi mu, na twerɛ mmuaeɛ a ɛtwa toɔ no wɔ \\boxed{} mu.",
        think_prefix="Mɛbua asɛmmisa yi anamɔn anamɔn wɔ Twi mu.",
        transition="Woakenkan mmuaeɛ a wɔatwerɛ no Borɔfo mu no. Afei fa w'ankasa wo nsɛmfua bua asɛmmisa yi wɔ Twi "
        "mu, anamɔn anamɔn.",
    ),
    # Text in Vai could not be written reliably, so the row says so and names Vai in English instead. Its labels say
    # "Vai" because the English ones would make the two problems of a teacher prompt look alike.
    Language(
        code="VAI",
        name="Vai",
        native_name="ꕙꔤ",
        script="Vaii",
        aliases=("vai_Vaii",),
        problem_label="Problem in Vai",
        solution_label="Solution in Vai",
        instruction="Reason step by step in Vai, and put the final answer in \\boxed{}.",
        think_prefix="Let me work through this problem in Vai, one step at a time.",
        transition="You have studied the reference solution in English. Now solve the problem again in your own words "
        "in Vai, step by step.",
        texts_language="EN",
    ),
    Language(
        code="WOL",
        name="Wolof",
        native_name="Wolof",
        script="Latn",
        aliases=("wo", "wol_Latn"),
        problem_label="Laaj",
        solution_label="Saafara",
        instruction="Xalaatal jéego ci jéego ci Wolof, ba noppi nga bind tontu bu mujj bi ci biir \\boxed{}.",
        think_prefix="Dinaa saafara laaj bii jéego ci jéego ci Wolof.",
        transition="Jàng nga saafara bi ñu bind ci Angale. Léegi saafaraal laaj bii ci say baat ci Wolof, jéego ci "
        "jéego.",
    ),
    Language(
        code="XHO",
        name="Xhosa",
        native_name="isiXhosa",
        script="Latn",
        aliases=("xh", "xho_Latn"),
        problem_label="Umbuzo",
        solution_label="Isisombululo",
        instruction="Cinga inyathelo ngenyathelo ngesiXhosa, uze ubhale impendulo yokugqibela "
        "ngaphakathi kwe-\\boxed{}.",
        think_prefix="Ndiza kusombulula lo mbuzo inyathelo ngenyathelo ngesiXhosa.",
        transition="Usifundile isisombululo esibhalwe ngesiNgesi. Ngoku sombulula lo mbuzo ngamazwi akho ngesiXhosa, "
        "inyathelo ngenyathelo.",
    ),
    Language(
        code="YOR",
        name="Yoruba",
        native_name="Yorùbá",
        script="Latn",
        aliases=("yo", "yor_Latn"),
        problem_label="Ìbéèrè",
        solution_label="Ojútùú",
        instruction="Ronú ní ìgbésẹ̀ sí ìgbésẹ̀ ní èdè Yorùbá, kí o sì kọ ìdáhùn ìkẹyìn sínú \\boxed{}.",
        think_prefix="Èmi yóò yanjú ìbéèrè yìí ní ìgbésẹ̀ sí ìgbésẹ̀ ní èdè Yorùbá.",
        transition="O ti ka ojútùú tí a kọ ní èdè Gẹ̀ẹ́sì. Ní báyìí, yanjú ìbéèrè náà ní ọ̀rọ̀ ara rẹ ní èdè Yorùbá, ní "
        "ìgbésẹ̀ sí ìgbésẹ̀.",
    ),
    Language(
        code="ZUL",
        name="Zulu",
        native_name="isiZulu",
        script="Latn",
        aliases=("zu", "zul_Latn"),
        problem_label="Umbuzo",
        solution_label="Isixazululo",
        instruction="Cabanga isinyathelo ngesinyathelo ngesiZulu, bese ubhala impendulo yokugcina "
        "ngaphakathi kwe-\\boxed{}.",
        think_prefix="Ngizoxazulula lo mbuzo isinyathelo ngesinyathelo ngesiZulu.",
        transition="Usifundile isixazululo esibhalwe ngesiNgisi. Manje xazulula lo mbuzo ngamazwi akho ngesiZulu, "
        "isinyathelo ngesinyathelo.",
    ),
)
