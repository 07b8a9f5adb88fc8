# What the README's picture of the benchmark looks like. The script "chart" runs this with
#   output, below                    the file to write; the line below the picture
#   stream, roundtrip_p50, clients   the carriers that have the panel's figures
#   $stream_CARRIER and so on        lines of "x median lowest highest"
# Blue is the straight way over loopback, orange the one through two proxies; each dashed in a
# lighter tone for plain TCP, which is its limit; OTP's own are grey. The background is white
# where GitHub's is dark, too.

name_direct       = 'meshx\_node'
name_sidecars     = 'meshx\_node, two proxies'
name_inet_tcp     = 'inet\_tcp'
name_inet_tls     = 'inet\_tls'
name_tcp          = 'plain TCP'
name_tcp_sidecars = 'plain TCP, two proxies'
colour_direct       = '#0072b2'
colour_sidecars     = '#d55e00'
colour_inet_tcp     = '#222222'
colour_inet_tls     = '#8c8c8c'
colour_tcp          = '#56b4e9'
colour_tcp_sidecars = '#f0a35e'
point_direct = 7; point_sidecars = 5; point_inet_tcp = 9; point_inet_tls = 11
point_tcp = 6; point_tcp_sidecars = 4
carrier(what, list, i) = value(what.'_'.word(list, i))
width(list, i) = word(list, i)[1:4] eq 'inet' ? 1.6 : word(list, i)[1:3] eq 'tcp' ? 1.3 : 2.6
dashes(list, i) = word(list, i)[1:3] eq 'tcp' ? 2 : 1

set terminal svg size 960,480 enhanced background '#ffffff' \
    font 'DejaVu Sans,Verdana,Helvetica,sans-serif,12'
set output output
set encoding utf8
set border 0
set tics scale 0 textcolor rgb '#444444'
set style line 100 lc rgb '#dddddd' lw 1
set bars 0.4
set dashtype 2 (7,4)
set multiplot
set label 1 below at screen 0.985,0.03 right noenhanced font ',10' textcolor rgb '#777777'

# ---- One way, by message size. The carriers stand beside each other.
set lmargin at screen 0.06
set rmargin at screen 0.56
set bmargin at screen 0.17
set tmargin at screen 0.87
set label 2 '{/:Bold One way, MB/s}, by message size' at graph 0,1.07 font ',13'
set logscale xy
set xrange [40:6.7e6]
set xtics ('64 B' 64, '1 KiB' 1024, '16 KiB' 16384, '64 KiB' 65536, '256 KiB' 262144, '4 MiB' 4194304)
set yrange [1:*] noextend # room for the key below the slowest
set ytics (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
set grid ytics ls 100
set key bottom right spacing 1.2 samplen 3 textcolor rgb '#222222'
beside(x, i) = x * 1.05 ** (i - 3.5)
if (words(stream) > 0) {
    plot for [i = 1:words(stream)] '$stream_'.word(stream, i) \
        using (beside($1, i)):2:3:4 with yerrorlines lc rgb carrier('colour', stream, i) \
        lw width(stream, i) dt dashes(stream, i) pt carrier('point', stream, i) ps 0.7 \
        title carrier('name', stream, i)
}

# ---- One value for each carrier, in rows: a panel above, one below.
unset label 1
unset key
unset logscale y
unset grid
set grid xtics ls 100
set lmargin at screen 0.765
set rmargin at screen 0.935
set xrange [*:*]
set xtics 10 font ',10' offset 0,0.4 textcolor rgb '#777777'

title_roundtrip_p50 = '{/:Bold Round trip, µs}, p50 with one outstanding'
title_clients = '{/:Bold 64 clients on one link}, 1000 round trips/s'
unit_roundtrip_p50 = 1.0
unit_clients = 1000.0
top_roundtrip_p50 = 0.87
top_clients = 0.44
number(x) = sprintf(x < 10 ? '%.1f' : '%.0f', x)

do for [panel in 'roundtrip_p50 clients'] {
    list = value(panel)
    unit = value('unit_'.panel)
    top = value('top_'.panel)
    set tmargin at screen top
    set bmargin at screen top - 0.31
    set label 2 value('title_'.panel) at screen 0.6,top + 0.05
    set yrange [-words(list) - 0.5:-0.5]
    set ytics ()
    set for [i = 1:words(list)] ytics add (carrier('name', list, i) -i)
    if (words(list) > 0) {
        plot for [i = 1:words(list)] '$'.panel.'_'.word(list, i) \
            using ($2/unit):(-i):($3/unit):($4/unit) with xerrorbars \
            lc rgb carrier('colour', list, i) lw 1.6 pt carrier('point', list, i) ps 0.8, \
            for [i = 1:words(list)] '$'.panel.'_'.word(list, i) \
            using ($4/unit):(-i):(number($2/unit)) with labels left offset 0.9,0 \
            textcolor rgb '#222222'
    }
}
unset multiplot
