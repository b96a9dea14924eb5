"""English and the languages of MGSM outside Africa: data only.

No text here comes from another project. ``checked`` says whether a speaker of the language has read the texts of a
row; a row that nobody has checked is used as it stands, and its ``caveat`` is shown to the user.
"""

from __future__ import annotations

from megatron_copsd.languages.entry import Language

WORLD: tuple[Language, ...] = (
    Language(
        code="EN",
        name="English",
        native_name="English",
        script="Latn",
        aliases=("eng", "eng_Latn"),
        problem_label="Problem",
        solution_label="Solution",
        instruction="Reason step by step in English, and put the final answer in \\boxed{}.",
        think_prefix="Let me work through this problem in English, one step at a time.",
        transition="You have studied the reference solution in English. Now solve the problem again in your own words "
        "in English, step by step.",
        checked=True,
    ),
    Language(
        code="DE",
        name="German",
        native_name="Deutsch",
        script="Latn",
        aliases=("deu", "deu_Latn"),
        problem_label="Aufgabe",
        solution_label="Lösung",
        instruction="Denke Schritt für Schritt auf Deutsch und schreibe das Endergebnis in \\boxed{}.",
        think_prefix="Ich löse diese Aufgabe Schritt für Schritt auf Deutsch.",
        transition="Du hast die Musterlösung auf Englisch gelesen. Löse die Aufgabe nun mit deinen eigenen Worten auf "
        "Deutsch, Schritt für Schritt.",
    ),
    Language(
        code="ES",
        name="Spanish",
        native_name="español",
        script="Latn",
        aliases=("spa", "spa_Latn"),
        problem_label="Problema",
        solution_label="Solución",
        instruction="Razona paso a paso en español y escribe la respuesta final en \\boxed{}.",
        think_prefix="Voy a resolver este problema paso a paso en español.",
        transition="Has estudiado la solución de referencia en inglés. Ahora resuelve el problema con tus propias "
        "palabras en español, paso a paso.",
    ),
    Language(
        code="FR",
        name="French",
        native_name="français",
        script="Latn",
        aliases=("fra", "fra_Latn"),
        problem_label="Problème",
        solution_label="Résolution",
        instruction="Raisonne étape par étape en français et écris la réponse finale dans \\boxed{}.",
        think_prefix="Je vais résoudre ce problème étape par étape en français.",
        transition="Tu as étudié la solution de référence en anglais. Résous maintenant le problème avec tes propres "
        "mots en français, étape par étape.",
    ),
    Language(
        code="JA",
        name="Japanese",
        native_name="日本語",
        script="Jpan",
        aliases=("jpn", "jpn_Jpan"),
        problem_label="問題",
        solution_label="解答",
        instruction="日本語で順を追って考え、最終的な答えを \\boxed{} の中に書いてください。",
        think_prefix="この問題を日本語で順を追って考えます。",
        transition="英語の模範解答を読みました。では、この問題を自分の言葉で、日本語で順を追って解いてください。",
    ),
    Language(
        code="ZH",
        name="Chinese",
        native_name="中文",
        script="Hans",
        aliases=("zho", "zho_Hans"),
        problem_label="问题",
        solution_label="解答",
        instruction="请用中文一步一步地推理，并把最终答案写在 \\boxed{} 中。",
        think_prefix="我用中文一步一步地来解这道题。",
        transition="你已经读过英文的参考解答。现在请用自己的话，用中文一步一步地重新解这道题。",
    ),
    Language(
        code="RU",
        name="Russian",
        native_name="русский",
        script="Cyrl",
        aliases=("rus", "rus_Cyrl"),
        problem_label="Задача",
        solution_label="Решение",
        instruction="Рассуждай шаг за шагом на русском языке и запиши окончательный ответ в \\boxed{}.",
        think_prefix="Я решу эту задачу шаг за шагом на русском языке.",
        transition="Ты прочитал образец решения на английском языке. Теперь реши задачу своими словами на русском "
        "языке, шаг за шагом.",
    ),
    Language(
        code="BN",
        name="Bengali",
        native_name="বাংলা",
        script="Beng",
        aliases=("ben", "ben_Beng"),
        problem_label="সমস্যা",
        solution_label="সমাধান",
        instruction="বাংলায় ধাপে ধাপে চিন্তা করুন এবং চূড়ান্ত উত্তরটি \\boxed{} এর মধ্যে লিখুন।",
        think_prefix="আমি এই সমস্যাটি বাংলায় ধাপে ধাপে সমাধান করব।",
        transition="আপনি ইংরেজিতে লেখা নমুনা সমাধানটি পড়েছেন। এখন সমস্যাটি নিজের ভাষায় বাংলায় ধাপে ধাপে সমাধান করুন।",
    ),
    Language(
        code="TE",
        name="Telugu",
        native_name="తెలుగు",
        script="Telu",
        aliases=("tel", "tel_Telu"),
        problem_label="సమస్య",
        solution_label="పరిష్కారం",
        instruction="తెలుగులో దశలవారీగా ఆలోచించి, తుది సమాధానాన్ని \\boxed{} లో రాయండి.",
        think_prefix="నేను ఈ సమస్యను తెలుగులో దశలవారీగా పరిష్కరిస్తాను.",
        transition="మీరు ఆంగ్లంలో ఉన్న నమూనా పరిష్కారాన్ని చదివారు. ఇప్పుడు ఈ సమస్యను మీ సొంత మాటల్లో తెలుగులో దశలవారీగా పరిష్కరించండి.",
    ),
    Language(
        code="TH",
        name="Thai",
        native_name="ไทย",
        script="Thai",
        aliases=("tha", "tha_Thai"),
        problem_label="โจทย์",
        solution_label="วิธีทำ",
        instruction="คิดทีละขั้นตอนเป็นภาษาไทย แล้วเขียนคำตอบสุดท้ายไว้ใน \\boxed{}",
        think_prefix="ฉันจะแก้โจทย์ข้อนี้ทีละขั้นตอนเป็นภาษาไทย",
        transition="คุณได้อ่านวิธีทำตัวอย่างที่เป็นภาษาอังกฤษแล้ว ตอนนี้ให้แก้โจทย์ข้อนี้ด้วยคำพูดของคุณเองเป็นภาษาไทยทีละขั้นตอน",
    ),
)
