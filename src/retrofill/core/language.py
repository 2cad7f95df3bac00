"""The English name of a language tag, as rows show it: `en-US`, `EN_us` and `eng` are English.

Only the language itself counts, not its country or script, as in Amplitude's own table. A full name stands for itself in
whatever case, and a text that is neither is kept as it came. It is done when a row is made, not when an event
is read: the bytes of a request stay those that were sent.

Source: contract, events 2, `language`; the names are those of the Unicode CLDR in English.
"""

from __future__ import annotations

from functools import lru_cache

# Tags, then the name. The first tag is the preferred one; the others are older or longer forms of it.
_TABLE = """
ab,abk Abkhazian; ace Acehnese; ach Acoli; ada Adangme; ady Adyghe; aa,aar Afar; afh Afrihili;
af,afr Afrikaans; agq Aghem; ain Ainu; ak,aka,twi Akan; akk Akkadian; bss Akoose; akz Alabama;
sq,als,sqi,alb Albanian; ale Aleut; arq Algerian Arabic; ase American Sign Language;
am,amh Amharic; egy Ancient Egyptian; grc Ancient Greek; anp Angika; blo Anii; njo Ao Naga;
ar,arb,ara Arabic; an,arg Aragonese; arc Aramaic; aro Araona; arp Arapaho; arw Arawak;
hy,hye,arm Armenian; rup Aromanian; frp Arpitan; as,asm Assamese; ast Asturian; asa Asu;
atj Atikamekw; cch Atsam; av,ava Avaric; ae,ave Avestan; awa Awadhi; ay,ayr,aym Aymara;
az,azj,aze Azerbaijani; bfq Badaga; ksf Bafia; bfd Bafut; bqi Bakhtiari; ban Balinese;
bal,bcc Baluchi; bm,bam Bambara; bax Bamun; bn,ben Bangla; bjn Banjar; bas Basaa;
ba,bak Bashkir; eu,eus,baq Basque; bbc Batak Toba; bar Bavarian; bej Beja; be,bel Belarusian;
bem Bemba; bez Bena; bew Betawi; bho,bh,bih Bhojpuri; bik,bcl Bikol; bin Bini; bpy Bishnupriya;
bi,bis Bislama; byn Blin; zbl Blissymbols; brx Bodo; bs,bos Bosnian; brh Brahui; bra Braj;
br,bre Breton; bug Buginese; bg,bul Bulgarian; bum Bulu; bua,bxr Buriat; my,mya,bur Burmese;
cad Caddo; frc Cajun French; yue Cantonese; cps Capiznon; car Carib;
crr,pmk Carolina Algonquian; ca,cat Catalan; cay Cayuga; ceb Cebuano;
tzm Central Atlas Tamazight; dtp,ktr,kzj,kzt,tdu Central Dusun; ckb Central Kurdish;
ojc Central Ojibwa; esu Central Yupik; shu Chadian Arabic; chg Chagatai; ccp Chakma;
ch,cha Chamorro; ce,che Chechen; chr Cherokee; chy Cheyenne; chb Chibcha; cic Chickasaw;
cgg Chiga; clc Chilcotin; qug Chimborazo Highland Quichua; zh,cmn,zho,chi Chinese;
chn Chinook Jargon; chp Chipewyan; cho Choctaw; cu,chu Church Slavic; chk Chuukese;
cv,chv Chuvash; nwc Classical Newari; syc Classical Syriac; ksh Colognian; swb Comorian;
cop Coptic; kw,cor Cornish; co,cos Corsican; cr,cwd,cre Cree; crh Crimean Tatar;
hr,scr,hrv Croatian; cs,ces,cze Czech; dak Dakota; da,dan Danish; dar Dargwa; dzg Dazaga;
del,umu Delaware; din,dik Dinka; dv,div Divehi; doi,dgo Dogri; dgr Dogrib; dua Duala;
nl,nld,dut Dutch; dyu Dyula; dz,adp,dzo Dzongkha; frs Eastern Frisian; efi Efik;
arz Egyptian Arabic; eka Ekajuk; elx Elamite; ebu Embu; egl Emilian; en,eng English; myv Erzya;
eo,epo Esperanto; et,ekk,est Estonian; ee,ewe Ewe; ewo Ewondo; ext Extremaduran; fan Fang;
fat Fanti; fo,fao Faroese; hif Fiji Hindi; fj,fij Fijian; fil,tgl Filipino; fi,fin Finnish;
fon Fon; gur Frafra; fr,fra,fre French; fur Friulian; ff,fuc,ful Fula; gaa Ga; gag Gagauz;
gl,glg Galician; gan Gan Chinese; lg,lug Ganda; gay Gayo; gba,gya Gbaya; gez Geez;
ka,kat,geo Georgian; de,deu,ger German; aln Gheg Albanian; bbj Ghomala; glk Gilaki;
gil Gilbertese; gon,gno Gondi; gor Gorontalo; got Gothic; grb,gbo Grebo; el,ell,gre Greek;
gn,gug,grn Guarani; gu,guj,prp Gujarati; guz Gusii; gwi Gwichʼin; hai,hdn Haida;
ht,hat Haitian Creole; hak Hakka Chinese; hur Halkomelem; bgc Haryanvi; ha,hau Hausa;
haw Hawaiian; he,iw,heb Hebrew; hz,her Herero; hil Hiligaynon; hi,hin Hindi; ho,hmo Hiri Motu;
hit Hittite; hmn,hea Hmong; hnj Hmong Njua; hu,hun Hungarian; hup Hupa; iba,blg,snb Iban;
ibb Ibibio; is,isl,ice Icelandic; io,ido Ido; ig,ibo Igbo; ilo Iloko; smn Inari Sami;
id,in,ind Indonesian; izh Ingrian; inh Ingush; moe Innu-aimun; ia,ina Interlingua;
ie,ile Interlingue; iu,ike,iku Inuktitut; ik,esk,ipk Inupiaq; ga,gle Irish; it,ita Italian;
jam Jamaican Creole English; ja,jpn Japanese; jv,jw,jav Javanese; kaj Jju; dyo Jola-Fonyi;
jrb,aju Judeo-Arabic; jpr Judeo-Persian; jut Jutish; kbd Kabardian; kea Kabuverdianu;
kab Kabyle; kac Kachin; kgp Kaingang; kkj Kako; kl,kal Kalaallisut; kln,spy Kalenjin;
xal Kalmyk; kam Kamba; kbl Kanembu; xnr Kangri; kn,kan Kannada; kr,knc,kau Kanuri;
kaa Kara-Kalpak; krc Karachay-Balkar; krl Karelian; ks,kas Kashmiri; csb Kashubian; kaw Kawi;
kk,kaz Kazakh; ken Kenyang; kha Khasi; km,khm Khmer; kho Khotanese; khw Khowar; ki,kik Kikuyu;
kmb,smd Kimbundu; krj Kinaray-a; rw,kin Kinyarwanda; kiu Kirmanjki; tlh Klingon; bkm Kom;
kv,kpv,kom Komi; koi Komi-Permyak; kg,kng,kon Kongo; kok,gom Konkani; ko,kor Korean; kfo Koro;
kos Kosraean; avk Kotava; khq Koyra Chiini; ses Koyraboro Senni; kpe,xpe Kpelle; kri Krio;
kj,kua Kuanyama; kum Kumyk; ku,kmr,kur Kurdish; kru,kxl Kurukh; kut Kutenai; kxv Kuvi;
kwk Kwakʼwala; nmg Kwasio; ky,kir Kyrgyz; quc Kʼicheʼ; lad Ladino; lkt Lakota; lam Lamba;
lag Langi; lo,lao Lao; ltg Latgalian; la,lat Latin; lv,lvs,lav Latvian; lzz Laz; lez Lezghian;
lij Ligurian; lil Lillooet; li,lim Limburgish; ln,lin Lingala; lfn Lingua Franca Nova;
lzh Literary Chinese; lt,lit Lithuanian; liv Livonian; jbo Lojban; lmo Lombard;
lou Louisiana Creole; nds Low German; sli Lower Silesian; dsb Lower Sorbian; loz Lozi;
lu,lub Luba-Katanga; lua Luba-Lulua; lui Luiseno; smj Lule Sami; lun Lunda; luo Luo;
lb,ltz Luxembourgish; luy,bxk Luyia; mde Maba; mk,mkd,mac Macedonian; jmc Machame; mad Madurese;
maf Mafa; mag Magahi; vmf Main-Franconian; mai Maithili; mak Makasar; vmw Makhuwa;
mgh Makhuwa-Meetto; kde Makonde; mg,plt,mlg Malagasy; ms,zsm,msa,may Malay; ml,mal Malayalam;
pqm Maliseet-Passamaquoddy; mt,mlt Maltese; mnc Manchu; mdr Mandar; man,emk,mnk Mandingo;
mni Manipuri; gv,glv Manx; arn Mapuche; mr,mar Marathi; chm,mhr Mari; mh,mah Marshallese;
mwr,dhd Marwari; mas Masai; mzn Mazanderani; byv Medumba; men Mende; mwv Mentawai; mer Meru;
mgo Metaʼ; mic Mi'kmaw; crg Michif; dum Middle Dutch; enm Middle English; frm Middle French;
gmh Middle High German; mga Middle Irish; nan Min Nan Chinese; min Minangkabau; xmf Mingrelian;
mwl Mirandese; lus Mizo; moh Mohawk; mdf Moksha; lol Mongo; mn,drh,khk,mon Mongolian;
crm Moose Cree; mfe Morisyen; ary Moroccan Arabic; mos Mossi; mua Mundang; mus Muscogee;
ttt Muslim Tat; mye Myene; mi,mri,mao Māori; ars Najdi Arabic; naq Nama; na,nau Nauru;
nv,nav Navajo; ng,ndo Ndonga; nap Neapolitan; ne,npi,nep Nepali; new Newari; sba Ngambay;
nnh Ngiemboon; jgo Ngomba; yrl Nheengatu; nia Nias; pcm Nigerian Pidgin; niu Niuean; nog Nogai;
nd,nde North Ndebele; crl Northern East Cree; frr Northern Frisian; lrc Northern Luri;
se,sme Northern Sami; nso Northern Sotho; ttm Northern Tutchone; ojb Northwestern Ojibwa;
no,nor Norwegian; nb,nob Norwegian Bokmål; nn,nno Norwegian Nynorsk; nov Novial; nus Nuer;
nym Nyamwezi; ny,nya Nyanja; nyn Nyankole; tog Nyasa Tonga; nyo Nyoro; nzi Nzima; nqo N’Ko;
ann Obolo; oc,oci Occitan; or,ory,ori Odia; ojs Oji-Cree; oj,ojg,oji Ojibwa; oka Okanagan;
ang Old English; fro Old French; goh Old High German; sga Old Irish; non Old Norse;
peo Old Persian; pro Old Provençal; om,gaz,orm Oromo; osa Osage; os,oss Ossetic;
ota Ottoman Turkish; pal Pahlavi; pfl Palatine German; pau Palauan; pi,pli Pali; pam Pampanga;
pag Pangasinan; pap Papiamento; ps,pbu,pus Pashto; pdc Pennsylvania German;
fa,pes,fas,per Persian; phn Phoenician; pcd Picard; pms Piedmontese; pis Pijin; crk Plains Cree;
pdt Plautdietsch; pon Pohnpeian; pl,pol Polish; pnt Pontic; pt,por Portuguese; prg Prussian;
pa,pan Punjabi; qu,quz,que Quechua; raj,mup Rajasthani; rap Rapanui; rar Rarotongan;
rif Riffian; rhg Rohingya; rgn Romagnol; ro,mo,mol,ron,rum Romanian; rm,roh Romansh;
rom,rmy Romany; rof Rombo; rtm Rotuman; rug Roviana; rn,run Rundi; ru,rus Russian; rue Rusyn;
rwk Rwa; lsm Saamia; ssy Saho; sam Samaritan Aramaic; saq Samburu; sm,smo Samoan;
sgs Samogitian; sad Sandawe; sg,sag Sango; sbp Sangu; sa,cls,san Sanskrit; sat Santali;
sc,src,srd Sardinian; sas Sasak; sdc Sassarese Sardinian; stq Saterland Frisian; saz Saurashtra;
sco Scots; gd,gla Scottish Gaelic; sly Selayar; sel Selkup; seh Sena; see Seneca;
sr,scc,srp Serbian; sh Serbo-Croatian; srr Serer; sei Seri; crs Seselwa Creole French;
ksb Shambala; shn Shan; sn,sna Shona; ii,iii Sichuan Yi; scn Sicilian; sid Sidamo; bla Siksiká;
szl Silesian; sd,snd Sindhi; si,sin Sinhala; sms Skolt Sami; den,xsl Slave; sk,slk,slo Slovak;
sl,slv Slovenian; xog Soga; sog Sogdien; so,som Somali; snk Soninke; nr,nbl South Ndebele;
alt Southern Altai; crj Southern East Cree; hax Southern Haida; sdh Southern Kurdish;
slh Southern Lushootseed; sma Southern Sami; st,sot Southern Sotho; tce Southern Tutchone;
es,spa Spanish; srn Sranan Tongo; zgh Standard Moroccan Tamazight; str Straits Salish;
suk Sukuma; sux Sumerian; su,sun Sundanese; sus Susu; sw,swh,swa Swahili; csw Swampy Cree;
ss,ssw Swati; sv,swe Swedish; gsw Swiss German; syr,cld Syriac; shi Tachelhit; tl Tagalog;
tgx Tagish; ty,tah Tahitian; tht Tahltan; blt Tai Dam; dav Taita; tg,tgk Tajik; tly Talysh;
tmh,ttq Tamashek; ta,tam Tamil; trv Taroko; twq Tasawaq; tt,tat Tatar; te,tel Telugu;
ter Tereno; teo Teso; tet Tetum; th,tha Thai; bo,bod,tib Tibetan; tig Tigre; ti,tir Tigrinya;
tem Timne; tiv Tiv; tli Tlingit; tpi Tok Pisin; tkl Tokelau; tok Toki Pona; to,ton Tongan;
fit Tornedalen Finnish; trw Torwali; tkr Tsakhur; tsd Tsakonian; tsi Tsimshian; ts,tso Tsonga;
tn,tsn Tswana; tcy Tulu; tum Tumbuka; aeb,ajt Tunisian Arabic; tr,tur Turkish; tk,tuk Turkmen;
tru Turoyo; tvl Tuvalu; tyv Tuvinian; tw Twi; kcg Tyap; udm Udmurt; uga Ugaritic;
uk,ukr Ukrainian; umb Umbundu; hsb Upper Sorbian; ur,urd Urdu; ug,uig Uyghur; uz,uzn,uzb Uzbek;
vai Vai; ve,ven Venda; vec Venetian; vep Veps; vi,vie Vietnamese; vo,vol Volapük; vot Votic;
vun Vunjo; vro Võro; wa,wln Walloon; wae Walser; war Waray; wbp Warlpiri; was Washo; guc Wayuu;
cy,cym,wel Welsh; vls West Flemish; bgn Western Balochi; ikt Western Canadian Inuktitut;
fy,fry Western Frisian; mrj Western Mari; ojw Western Ojibwa; lah,pnb Western Panjabi;
wal Wolaytta; wo,wol Wolof; wuu Wu Chinese; xh,xho Xhosa; hsn Xiang Chinese; sah Yakut;
yav Yangben; yao Yao; yap Yapese; ybb Yemba; yi,ji,ydd,yid Yiddish; yo,yor Yoruba;
zap,zai Zapotec; dje Zarma; zza,diq Zaza; zea Zeelandic; zen Zenaga; za,zyb,zha Zhuang;
gbz Zoroastrian Dari; zu,zul Zulu; zun Zuni
"""

_TAGS_AND_NAMES = [entry.strip().split(" ", 1) for entry in _TABLE.replace("\n", " ").split(";")]
NAMES = {tag: name for tags, name in _TAGS_AND_NAMES for tag in tags.split(",")}
_FULL_NAMES = {name.casefold(): name for name in NAMES.values()}


@lru_cache(maxsize=4096)
def name(text: str) -> str:
    """Return the English name of the language that a text means, or the text itself."""
    said = text.strip().casefold()
    primary = said.replace("_", "-").partition("-")[0].partition(".")[0]
    return _FULL_NAMES.get(said) or NAMES.get(primary) or text
